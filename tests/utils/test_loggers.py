"""Tests of scalars, tables, pictures and pages in the loggers' own libraries, offline."""

from __future__ import annotations

import csv
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer, loggers as lightning_loggers
from lightning.pytorch.loggers import CometLogger, CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger

from helpers.training import parts, trainer
from opsd_lightning.callbacks.rollouts import RolloutTable
from opsd_lightning.models.policy import Policy
from opsd_lightning.utils.loggers import accepts_figures, log_figure, log_page, log_table

pytestmark = pytest.mark.integration


pytest.importorskip("matplotlib", reason="pip install 'opsd-lightning[plots]'")

NASTY = "a | b\nπ = 3.14, \"so\" <b>it</b> is"  # fmt: skip


class Show(Callback):
    """One table, one picture and one page, after each of two steps."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        from matplotlib.figure import Figure

        step = trainer.global_step
        figure = Figure(figsize=(2, 1), dpi=50)  # 100 x 50 pixels
        figure.subplots().plot([0, step])
        path = Path(trainer.default_root_dir) / "page.html"
        path.write_text(f"<p>step {step}</p>", encoding="utf-8")
        log_table(trainer.loggers, "answers", ["step", "text"], [[step, NASTY], [step, None]], step)
        log_figure(trainer.loggers, "tokens", figure, step)
        log_page(trainer.loggers, "page", path, step)


def table_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def size_of(path: str | Path | io.BytesIO) -> tuple[int, int]:
    from PIL import Image

    with Image.open(path) as picture:
        return picture.size


def fit(logger: Logger, policy: Policy, folder: Path) -> dict[str, float]:
    """Two steps with a validation after each; what the trainer logged last."""
    run = trainer(folder, Show(), RolloutTable(every_n_steps=1, rows=2), logger=logger, max_steps=2, val_check_interval=1)
    run.fit(*parts(policy))
    return {name: float(value) for name, value in run.logged_metrics.items()}


def test_csv_logger_gets_tables_and_pages(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "logs")
    logged = fit(logger, make_policy(), tmp_path)
    folder = Path(logger.log_dir)
    rows = table_of(folder / "metrics.csv")
    assert [float(row["train/loss"]) for row in rows if row["train/loss"]][-1] == pytest.approx(logged["train/loss"])
    table = table_of(folder / "answers.csv")
    assert [row["step"] for row in table] == ["1", "1", "2", "2"] and table[0]["text"] == NASTY and table[1]["text"] == ""
    assert len(table_of(folder / "rollouts.csv")) == 4
    pictures = sorted((folder / "tokens").iterdir())
    assert [path.name for path in pictures] == ["step-000001.png", "step-000002.png"]  # and nothing half-written
    assert size_of(pictures[0]) == (100, 50)


def test_tensorboard_gets_scalars_tables_and_pictures(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="pip install 'opsd-lightning[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    logged = fit(logger, make_policy(), tmp_path)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert events.Scalars("train/loss")[-1].value == pytest.approx(logged["train/loss"])
    assert "val/avg@2" in events.Tags()["scalars"]
    first, second = events.Tensors("answers/text_summary")
    text = first.tensor_proto.string_val[0].decode()
    # A bar or a line break inside a cell must not begin another.
    assert (first.step, second.step) == (1, 2) and "| 1 | a \\| b<br>π = 3.14" in text and text.count("\n") == 3
    pictures = events.Images("tokens")
    assert [(picture.step, picture.width, picture.height) for picture in pictures] == [(1, 100, 50), (2, 100, 50)]


def test_weights_and_biases_gets_scalars_tables_and_pages(
    make_policy: Callable[..., Policy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="pip install 'opsd-lightning[wandb]'")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(offline=True, save_dir=tmp_path)
    logged = fit(logger, make_policy(), tmp_path)
    summary = dict(logger.experiment.summary)
    assert summary["train/loss"] == pytest.approx(logged["train/loss"]) and "val/avg@2" in summary
    wandb.finish()
    tables = [json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.rglob("media/table/answers*.table.json")]
    assert sorted(table["data"] for table in tables) == [[[1, NASTY], [1, None]], [[2, NASTY], [2, None]]]
    rollouts = [json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.rglob("media/table/rollouts*.table.json")]
    assert [len(table["data"]) for table in rollouts] == [2, 2] and rollouts[0]["columns"] == list(RolloutTable.COLUMNS)
    assert [size_of(path) for path in tmp_path.rglob("media/images/tokens*.png")] == [(100, 50)] * 2
    pages = {path.read_text(encoding="utf-8").split("<p>")[1] for path in tmp_path.rglob("media/html/page*.html")}
    assert pages == {"step 1</p>", "step 2</p>"}


@pytest.fixture
def mlflow_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # newer ones prefer a database; files need no server
    return (tmp_path / "mlruns").as_uri()


@pytest.mark.filterwarnings("ignore:MLFlow only allows:RuntimeWarning:lightning.pytorch.loggers.mlflow")
@pytest.mark.filterwarnings("ignore:For backward compatibility:DeprecationWarning:mlflow")
def test_mlflow_gets_scalars_tables_and_pages(make_policy: Callable[..., Policy], tmp_path: Path, mlflow_uri: str) -> None:
    pytest.importorskip("mlflow", reason="pip install 'opsd-lightning[mlflow]'")
    logger = MLFlowLogger("opsd", tracking_uri=mlflow_uri)
    logged = fit(logger, make_policy(), tmp_path)
    client, run = logger.experiment, logger.run_id
    assert client.get_metric_history(run, "train/loss")[-1].value == pytest.approx(logged["train/loss"], rel=1e-5)
    assert client.get_metric_history(run, "val/avg2"), "MLflow knows no @ in names: Lightning leaves it out"
    table = json.loads(Path(client.download_artifacts(run, "answers.json")).read_text(encoding="utf-8"))
    assert table["columns"] == ["step", "text"]
    assert table["data"] == [[1, NASTY], [1, None], [2, NASTY], [2, None]]
    assert len(json.loads(Path(client.download_artifacts(run, "rollouts.json")).read_text(encoding="utf-8"))["data"]) == 4
    pictures = [item.path for item in client.list_artifacts(run, "images") if item.path.endswith(".png")]
    assert sorted(path.split("step")[1].lstrip("+%")[0] for path in pictures) == ["1", "2"]
    assert size_of(client.download_artifacts(run, pictures[0])) == (100, 50)
    assert Path(client.download_artifacts(run, "pages/page.html")).read_text(encoding="utf-8") == "<p>step 2</p>"


def comet_logger(comet_ml: Any, folder: Path) -> CometLogger:
    """A logger whose experiment goes to a file. Lightning switches an experiment that is not online off as a whole."""
    logger = CometLogger(online=False, offline_directory=str(folder))
    config = comet_ml.ExperimentConfig(
        offline_directory=str(folder), auto_output_logging=False, log_code=False, log_git_metadata=False
    )
    logger._experiment = comet_ml.start(online=False, mode="create", project="opsd", experiment_config=config)
    return logger


def test_comet_gets_scalars_tables_and_pages(
    make_policy: Callable[..., Policy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMET_DISABLE_AUTO_LOGGING", "1")
    comet_ml = pytest.importorskip("comet_ml", reason="pip install 'opsd-lightning[comet]'")
    logger = comet_logger(comet_ml, tmp_path / "comet")
    logged = fit(logger, make_policy(), tmp_path)
    logger.experiment.end()
    (archive,) = (tmp_path / "comet").glob("*.zip")
    with zipfile.ZipFile(archive) as file:
        messages = [json.loads(line) for line in file.read("messages.json").decode().splitlines()]
        uploads = [each["payload"] for each in messages if each["type"] == "file_upload"]
        stored = [(each["additional_params"], file.read(Path(each["file_path"]).name)) for each in uploads]
    metrics = [each["payload"]["metric"] for each in messages if each["type"] == "metric_msg"]
    losses = [each["metricValue"] for each in metrics if each["metricName"] == "train/loss"]
    assert losses[-1] == pytest.approx(logged["train/loss"])
    named = {(params.get("fileName") or params.get("figName"), params.get("step")): content for params, content in stored}
    for step in (1, 2):
        table = list(csv.reader(io.StringIO(named[f"answers/step-{step:06d}.csv", step].decode(), newline="")))
        assert table == [["step", "text"], [str(step), NASTY], [str(step), ""]]
        assert f"rollouts/step-{step:06d}.csv" in {name for name, _ in named}
    pictures = [content for (name, _), content in named.items() if name.startswith("tokens")]
    assert [size_of(io.BytesIO(content)) for content in pictures] == [(100, 50)] * 2
    pages = [content for (name, _), content in named.items() if name == "pages/page.html"]
    assert pages[-1] == b"<p>step 2</p>"


def stored_experiment(litlogger: Any, folder: Path) -> Any:
    """An experiment of LitLogger's library, which has no offline mode, with files in a folder in place of uploads."""

    class Stored(litlogger.Experiment):  # type: ignore[misc]
        def __init__(self) -> None:
            self.name, self.numbers, self.labels = "opsd", list[tuple[str, float, int | None]](), dict[str, str]()
            self._key_types, self._series, self._metadata_values, self._static_files = {}, {}, {}, {}

        def _resolve_remote_model(self, key: str) -> None:
            return None

        def _log_metric_value(self, key: str, value: float, step: int | None = None) -> None:
            self.numbers.append((key, value, step))

        def _set_metadata_value(self, key: str, value: str) -> None:
            self.labels[key] = value

        def _upload_media(self, name: str, file_path: str, media_type: Any, step: int | None = None, **more: Any) -> None:
            place = folder / name / f"{step}-{media_type.value}"
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file_path, place)

        def _set_static_file(self, key: str, value: Any) -> None:
            (folder / key).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(value._get_upload_path(), folder / key)
            value._cleanup()

        def finalize(self, status: str | None = None) -> None:
            pass

    return Stored()


@pytest.mark.filterwarnings("ignore:LitLogger does not support `log_graph`:UserWarning")
def test_litlogger_gets_scalars_tables_and_pages(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    litlogger = pytest.importorskip("litlogger", reason="pip install 'opsd-lightning[litlogger]'")
    if not hasattr(lightning_loggers, "LitLogger"):
        pytest.skip("Lightning 2.6.0 has no LitLogger")
    logger = lightning_loggers.LitLogger(tmp_path, name="opsd", save_logs=False)
    logger._experiment = experiment = stored_experiment(litlogger, tmp_path / "stored")
    logged = fit(logger, make_policy(), tmp_path)
    assert [value for key, value, _ in experiment.numbers if key == "train/loss"][-1] == pytest.approx(logged["train/loss"])
    stored = tmp_path / "stored"
    for step in (1, 2):
        assert "| a \\| b<br>π = 3.14" in (stored / "tables" / "answers" / f"{step}-text").read_text(encoding="utf-8")
        assert (stored / "tables" / "rollouts" / f"{step}-text").exists()
        assert size_of(stored / "figures" / "tokens" / f"{step}-image") == (100, 50)
    assert (stored / "pages" / "page.html").read_text() == "<p>step 2</p>"


def test_a_logger_of_another_kind_is_passed_over(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    assert not accepts_figures([DummyLogger()]) and accepts_figures([DummyLogger(), CSVLogger(tmp_path)])
    fit(DummyLogger(), make_policy(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"page.html", "rollouts.csv"}
