"""Tables, pictures and pages in the way that each logger's users know them; scalars go through Lightning's ``log``.

                 table                              picture                          page (HTML)
    CSV          NAME.csv beside ``metrics.csv``    NAME/step-N.png beside it        the file on disk is enough
    TensorBoard  Markdown in the Text tab           the Images tab, with its steps   has no place for one
    W&B          a ``wandb.Table``                  a ``wandb.Image``                a ``wandb.Html``
    MLflow       the artifact NAME.json, appended   an image of the run, with steps  the artifact pages/FILE

Only the global rank zero may call these. A logger of another kind is passed over. One that cannot write is warned of.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from opsd_lightning.utils.csv_tables import append_rows
from opsd_lightning.utils.disk_errors import warn_on_write_error
from opsd_lightning.utils.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def log_table(
    loggers: Iterable[Logger], name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
) -> None:
    """Give every logger a table.

    Args:
        loggers: The trainer's.
        name: Of the table. Later tables of this name join it, or stand beside it under their own step.
        columns: Their names.
        rows: One value a column each: a string, number, truth value or None.
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


def log_figure(loggers: Iterable[Logger], name: str, figure: Figure, step: int) -> None:
    """Give every logger a picture.

    Args:
        loggers: The trainer's.
        name: Of the picture. Later ones of this name stand beside it, under their own step.
        figure: A figure of matplotlib's. The caller closes it.
        step: Optimizer steps made so far.
    """
    png: bytes | None = None
    for logger in loggers:
        with warn_on_write_error(logger, f"{name} of {type(logger).__name__}"):
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure(name, figure, step, close=False)
                continue
            if not isinstance(logger, (CSVLogger, WandbLogger, MLFlowLogger)):
                continue
            if png is None:  # drawn once for all of them
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
            else:
                logger.experiment.log_image(logger.run_id, image, key=name, step=step)


def log_page(loggers: Iterable[Logger], name: str, path: Path, step: int) -> None:
    """Give a page on disk to the loggers that can show one.

    Args:
        loggers: The trainer's.
        name: Of the page. A later page of this name takes its place, or stands beside it under its own step.
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


def accepts_figures(loggers: Iterable[Logger]) -> bool:
    """Whether `log_figure` has a place for a picture."""
    return any(isinstance(logger, (CSVLogger, TensorBoardLogger, WandbLogger, MLFlowLogger)) for logger in loggers)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        return str(value).replace("|", "\\|").replace("\n", "<br>")

    lines = [list(columns), ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines)
