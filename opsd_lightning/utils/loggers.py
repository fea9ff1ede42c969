"""Log tables, figures and HTML pages in each logger's own format. Scalars go through Lightning's ``log``.

                 table                              figure                           page (HTML)
    CSV          NAME.csv beside ``metrics.csv``    NAME/step-N.png beside it        not logged: already on disk
    TensorBoard  Markdown in the Text tab           Images tab, by step              not supported
    W&B          ``wandb.Table``                    ``wandb.Image``                  ``wandb.Html``
    MLflow       artifact NAME.json, appended       image of the run, by step        artifact pages/FILE
    Comet        asset NAME/step-N.csv              image, by step                   asset pages/FILE, replaced
    LitLogger    text tables/NAME, by step          image figures/NAME, by step      file pages/FILE, replaced

Call these functions on global rank 0 only. Other loggers are skipped. A logger that cannot write causes a warning.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import loggers as lightning_loggers
from lightning.pytorch.loggers import CometLogger, CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from opsd_lightning.utils.csv_tables import append_rows, table_bytes
from opsd_lightning.utils.disk_errors import warn_on_write_error
from opsd_lightning.utils.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Lightning's `LitLogger`, or no class: Lightning 2.6.0 has none.
_LIT_LOGGER: Any = getattr(lightning_loggers, "LitLogger", ())
_WITH_FIGURES = (CSVLogger, TensorBoardLogger, WandbLogger, MLFlowLogger, CometLogger, _LIT_LOGGER)


def log_table(
    loggers: Iterable[Logger], name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
) -> None:
    """Log a table to every supported logger.

    Args:
        loggers: Loggers of the trainer.
        name: Name of the table. Later tables of this name are appended, or logged under their own step.
        columns: Column names.
        rows: Rows with one string, number, boolean or None for each column.
        step: Optimizer steps made so far.
    """
    for logger in loggers:
        with warn_on_write_error(logger, f"{name} of {type(logger).__name__}"):
            if isinstance(logger, CSVLogger):
                append_rows(Path(logger.log_dir) / f"{name}.csv", columns, rows)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text(name, _markdown(columns, rows), step)
            elif isinstance(logger, WandbLogger):
                logger.log_table(name, columns=list(columns), data=[list(row) for row in rows], step=step)
            elif isinstance(logger, MLFlowLogger):
                data = {column: [row[index] for row in rows] for index, column in enumerate(columns)}
                logger.experiment.log_table(logger.run_id, data, f"{name}.json")
            elif isinstance(logger, CometLogger):
                # Not Comet's `log_table`: it uploads a local file of the table's name, if there is one.
                content = io.BytesIO(table_bytes(columns, rows))
                logger.experiment.log_asset(content, file_name=f"{name}/step-{step:06d}.csv", step=step)
            elif isinstance(logger, _LIT_LOGGER):
                from litlogger.media import Text

                # The prefix keeps the table apart from a setting or metric of the same name.
                logger.experiment[f"tables/{name}"].append(Text(_markdown(columns, rows)), step)


def log_figure(loggers: Iterable[Logger], name: str, figure: Figure, step: int) -> None:
    """Log a figure to every supported logger.

    Args:
        loggers: Loggers of the trainer.
        name: Name of the figure. Later figures of this name are logged under their own step.
        figure: A matplotlib figure. The caller closes it.
        step: Optimizer steps made so far.
    """
    png: bytes | None = None
    for logger in loggers:
        with warn_on_write_error(logger, f"{name} of {type(logger).__name__}"):
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure(name, figure, step, close=False)
                continue
            if not isinstance(logger, _WITH_FIGURES):
                continue
            if png is None:  # rendered once for all loggers
                buffer = io.BytesIO()
                figure.savefig(buffer, format="png")
                png = buffer.getvalue()
            if isinstance(logger, CSVLogger):
                path = Path(logger.log_dir) / name / f"step-{step:06d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(path, png)
                continue
            from PIL import Image

            image = Image.open(io.BytesIO(png)).convert("RGB")
            if isinstance(logger, WandbLogger):
                logger.log_image(name, [image], step=step)
            elif isinstance(logger, CometLogger):
                logger.experiment.log_image(image, name=name, step=step)
            elif isinstance(logger, _LIT_LOGGER):
                from litlogger.media import Image as LitImage

                logger.experiment[f"figures/{name}"].append(LitImage(image), step)
            elif isinstance(logger, MLFlowLogger):
                logger.experiment.log_image(logger.run_id, image, key=name, step=step)


def log_page(loggers: Iterable[Logger], name: str, path: Path, step: int) -> None:
    """Log an HTML page to the loggers that can show one.

    Args:
        loggers: Loggers of the trainer.
        name: Name of the page. A later page of this name replaces it, or is logged under its own step.
        path: A self-contained HTML file.
        step: Optimizer steps made so far.
    """
    for logger in loggers:
        with warn_on_write_error(logger, f"{name} of {type(logger).__name__}"):
            if isinstance(logger, WandbLogger):
                from wandb import Html

                logger.log_metrics({name: Html(path)}, step)  # type: ignore[dict-item]
            elif isinstance(logger, MLFlowLogger):
                logger.experiment.log_artifact(logger.run_id, str(path), "pages")
            elif isinstance(logger, CometLogger):
                logger.experiment.log_asset(str(path), file_name=f"pages/{path.name}", overwrite=True, step=step)
            elif isinstance(logger, _LIT_LOGGER):
                from litlogger.media import File

                logger.experiment[f"pages/{path.name}"] = File(str(path))


def accepts_figures(loggers: Iterable[Logger]) -> bool:
    """Return True if `log_figure` supports one of the loggers."""
    return any(isinstance(logger, _WITH_FIGURES) for logger in loggers)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        return str(value).replace("|", "\\|").replace("\n", "<br>")

    lines = [list(columns), ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines)
