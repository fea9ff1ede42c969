"""``opsd show``: the token page for questions that are typed in, served on the loopback interface."""

from __future__ import annotations

import argparse
from pathlib import Path

from opsd_lightning.utils.terminal import SafeArgumentParser, error_line, say


def main(argv: list[str] | None = None) -> None:
    """Run ``opsd show``.

    Raises:
        SystemExit: With status 2 for a mistake of the user.
    """
    parser = SafeArgumentParser(
        prog="opsd show",
        description="Show the tokens of student and teacher for questions that you type, on a page in your browser.",
        epilog="The page is served on 127.0.0.1 alone, at an address with a random token. Nothing is written to disk.",
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="checkpoint file (.ckpt) of a run, folder of an exported adapter, or a model: a folder or a Hugging Face id",
    )
    parser.add_argument("--model", help="base model of an exported adapter, instead of the one that it names")
    parser.add_argument("--pad_token", metavar="TOKEN", help="padding token, for a model without one, such as its EOS token")
    parser.add_argument("--chat_template", metavar="FILE", help="Jinja file with a chat template, for a model without one")
    parser.add_argument("--device", help="device of the model, such as cpu or cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--port", type=int, default=0, help="port of the page (default: a free one)")
    options = parser.parse_args(argv)
    if not 0 <= options.port < 2**16:
        parser.error(f"--port: it is {options.port}. Give a number from 0 to 65535")
    try:
        _serve(options)
    except KeyboardInterrupt:
        say("Stopped.")


def _serve(options: argparse.Namespace) -> None:
    """Load the models and serve the page until Ctrl-C."""
    say("Loading the model ...", error=True)
    # Imported here, so that `opsd show --help` answers at once.
    from opsd_lightning.reports.html import render_template
    from opsd_lightning.reports.loopback import LoopbackServer
    from opsd_lightning.types import UserError
    from opsd_lightning.utils.files import script_json
    from opsd_lightning.utils.library_messages import hide_library_messages

    given = {name: getattr(options, name) for name in ("pad_token", "chat_template")}
    try:
        with hide_library_messages():
            from opsd_lightning.reports.live import load_live

            live = load_live(options.checkpoint, options.model, options.device, **given)
    except UserError as error:
        names = {f"model.policy.{name}": f"--{name}" for name in given}
        is_adapter = (Path(options.checkpoint).expanduser() / "adapter_config.json").is_file()
        names |= dict.fromkeys(("ckpt_path", "model.policy.adapter", "model.policy.model"), "CHECKPOINT")
        if is_adapter:
            names["model.policy.model"] = "--model"
        say(error_line(error, names), error=True)
        raise SystemExit(2) from error
    page = render_template("show.html", script_json({"run": live.describe(), "steps": []}))
    try:
        server = LoopbackServer(page, live.answer, options.port)
    except OSError as error:
        say(f"error: --port: cannot listen on port {options.port} ({error.strerror}). Choose another port", error=True)
        raise SystemExit(2) from error
    with server:
        say(f"Open in a browser on this machine (Ctrl-C ends it):\n{server.address}")
        server.serve_forever()
