"""What a model is: `python -m mesh.runtime.inspect MODEL --cache DIR` prints one line of JSON.

    {"spec": ModelSpec, "tokenizer": FOLDER, "path": PATH, "eos": [ID, ...]}      exit code 0
    {"error": CODE, "message": LINE}                                             exit code of that error

It runs as a process of its own because the daemon must import neither torch nor transformers. `path` is what a worker
opens. A GGUF file becomes a folder below DIR with the settings and the tokenizer that transformers makes of its header,
and a link to the file, so that no worker needs to parse the header again. Answers are kept below DIR under the model's
path, time and size.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from mesh.errors import MeshError, ModelError
from mesh.runtime.resolve import resolve
from topology.model import DTYPE_BYTES, ModelSpec

#: Raised whenever what is kept changes its form.
VERSION = 1

#: Files from which transformers can convert a tokenizer.
VOCABULARIES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json", "tiktoken.model")


def main(arguments: list[str] | None = None) -> int:
    """Print the answer; give the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mesh.runtime.inspect", description="What a model is, as JSON")
    parser.add_argument("model", help="a folder, a .gguf file or a Hugging Face id")
    parser.add_argument("--cache", type=Path, required=True, help="folder for what is worth keeping")
    options = parser.parse_args(arguments)
    # Libraries below may print; the answer must stay the only line on the real stdout.
    out, sys.stdout = sys.stdout, sys.stderr
    try:
        answer, code = inspect_model(options.model, options.cache), 0
    except MeshError as error:
        answer, code = {"error": error.code, "message": str(error)}, error.exit_code
    finally:
        sys.stdout = out
    print(json.dumps(answer), flush=True)
    return code


def inspect_model(model: str, cache: Path) -> dict[str, Any]:
    """The answer for `model`, from the cache where the model has not changed. Raises ModelError."""
    path = resolve(model)
    cache = cache.expanduser().absolute()
    kept = cache / _key(path)
    answer = kept / "answer.json"
    if answer.is_file():
        try:
            found: dict[str, Any] = json.loads(answer.read_bytes())
            if Path(found["tokenizer"]).is_dir():
                return found
        except (ValueError, KeyError, TypeError):
            pass  # half written by an older version: made again
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        part = Path(scratch) / "part"
        part.mkdir()
        found = _inspect(path, part, kept)
        if not Path(model).expanduser().exists():
            found["spec"]["name"] = model  # a Hugging Face id says more than the folder it is cached in
        (part / "answer.json").write_text(json.dumps(found))
        part.chmod(0o755)
        if kept.exists():
            shutil.rmtree(kept)
        try:
            part.replace(kept)
        except OSError:
            if not answer.is_file():  # otherwise another process was quicker, with the same answer
                raise
    return found


def _inspect(path: Path, part: Path, kept: Path) -> dict[str, Any]:
    """Look at the model; what must be kept beside the answer is written to `part`, which will become `kept`."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from mesh.runtime.source import open_model

    source = open_model(str(path))
    config = _configuration(source.config, path)
    dtype = source.default_dtype()
    if dtype not in DTYPE_BYTES:
        raise ModelError(f"{path} is stored as {dtype}; known are {', '.join(DTYPE_BYTES)}")
    spec = _spec(config, path, dtype)
    source.close()
    served = path
    if source.gguf and path.is_file():
        (part / "config.json").write_text(json.dumps(source.config, default=str))
        (part / "model.gguf").symlink_to(path)
        served = kept
    tokenizer = _tokenizer(path, part, kept)
    return {
        "spec": spec.to_dict(),
        "tokenizer": str(tokenizer),
        "path": str(served),
        "eos": _eos(tokenizer, part, kept),
    }


def _configuration(document: dict[str, Any], path: Path) -> Any:
    """transformers' configuration, of a decoder that can be cut. Raises ModelError."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from mesh.runtime.plans import layer_plan

    family = document["model_type"]
    if family not in CONFIG_MAPPING:
        raise ModelError(f"{path}: architecture {family} is unknown to transformers")
    if document.get("quantization_config"):
        raise ModelError(f"{path} is quantised; give the unquantised model or a GGUF file")
    classes = document.get("architectures") or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family, "")]
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or not str(classes[0]).endswith("ForCausalLM"):
        raise ModelError(f"{path}: {classes[0] or family} is not a decoder-only language model")
    try:
        config = CONFIG_MAPPING[family].from_dict(document)
    except Exception as error:  # configurations check themselves with exceptions of many kinds
        raise ModelError(f"{path / 'config.json'} is damaged: {' '.join(str(error).split())[:200]}") from error
    layer_plan(config, str(path))
    return config


def _spec(config: Any, path: Path, dtype: str) -> ModelSpec:
    try:
        heads = int(config.num_attention_heads)
        return ModelSpec(
            name=path.stem if path.is_file() else path.name,
            layers=int(config.num_hidden_layers),
            hidden=int(config.hidden_size),
            heads=heads,
            kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
            intermediate=int(config.intermediate_size),
            vocab=int(config.vocab_size),
            tied_embeddings=bool(config.tie_word_embeddings),
            dtype=dtype,
            context=int(config.max_position_embeddings),
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: its settings lack a plain decoder's shape ({error})") from error


def _tokenizer(path: Path, part: Path, kept: Path) -> Path:
    """A folder with tokenizer.json: the model's own, else one that transformers converts."""
    if path.is_dir() and (path / "tokenizer.json").is_file():
        return path
    if path.is_dir() and not any((path / name).is_file() for name in VOCABULARIES):
        # transformers would make an empty tokenizer for some families rather than say that there is none
        raise ModelError(f"{path} has no tokenizer: neither tokenizer.json nor {', '.join(VOCABULARIES)}")
    from transformers import AutoTokenizer

    try:
        if path.is_file():
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        else:
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        tokenizer.save_pretrained(part)
    except Exception as error:  # converters raise whatever they stumble on
        raise ModelError(f"{path} has no tokenizer that can be read: {' '.join(str(error).split())[:200]}") from error
    if not (part / "tokenizer.json").is_file():
        raise ModelError(f"{path} has no tokenizer.json, and its tokenizer cannot be converted to one")
    if path.is_dir():
        for name in ("config.json", "generation_config.json"):
            if (path / name).is_file():
                shutil.copy(path / name, part / name)
    return kept


def _eos(tokenizer: Path, part: Path, kept: Path) -> list[int]:
    from mesh.runtime.text import Text

    return sorted(Text.load(part if tokenizer == kept else tokenizer).eos)


def _key(path: Path) -> str:
    """A name that changes whenever the model does: path, times and sizes of its files."""
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    stats = [(file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    document = json.dumps([VERSION, str(path), stats])
    return hashlib.blake2b(document.encode(), digest_size=16).hexdigest()


if __name__ == "__main__":
    raise SystemExit(main())
