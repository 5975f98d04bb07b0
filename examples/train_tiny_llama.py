"""Train `tiny-llama`, the language model inside the package, from text that every machine has.

    python examples/train_tiny_llama.py --minutes 90 --output optimum_order/assets/tiny-llama

The corpus is the English prose of Python itself: the docstrings of the standard library and of
every installed package, and the packages' READMEs. The held-out text is the reference manual that
CPython carries as `pydoc_data.topics`; none of its lines of 40 characters or more is trained on.

The recipe: a 4096-token byte-level BPE, a 4.2 M-parameter Llama with grouped-query attention, Muon
(Jordan et al. 2024) on the matrices and AdamW on the embedding and the norms, bfloat16 matrix
products, and a learning rate that decays linearly to zero over the second half of the time budget.
The reported figure is bits per byte of the *whole* held-out text.
"""

import argparse
import hashlib
import importlib.metadata
import json
import math
import random
import re
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from optimum_order.data.builtin import docstrings, reference_topics

VOCABULARY = 4096
WINDOW = 512
BOS = "<|begin|>"
EOS = "<|end|>"
CONFIG = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2 * WINDOW,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
}


def corpus() -> list[str]:
    """Return unique prose, one document per docstring, without paragraphs that are held out."""
    forbidden = {
        line.strip()
        for text in reference_topics()
        for line in text.splitlines()
        if len(line.strip()) >= 40
    }
    standard = Path(sysconfig.get_path("stdlib"))
    site = Path(sysconfig.get_path("purelib"))
    files = [file for file in sorted(standard.rglob("*.py")) if "site-packages" not in file.parts]
    files = [file for file in files if "pydoc_data" not in file.parts] + sorted(site.rglob("*.py"))
    installed: Iterator[Any] = (package.metadata for package in importlib.metadata.distributions())
    readmes = (
        metadata.get_payload() or metadata.get("Description") or "" for metadata in installed
    )
    documents: list[str] = []
    seen: set[bytes] = set()
    for text in [*readmes, *(text for file in files for text in docstrings(file))]:
        paragraphs = []
        for paragraph in re.split(r"\n\s*\n", text):
            words = " ".join(paragraph.split()).encode("utf-8", "replace")
            key = hashlib.blake2b(words, digest_size=8).digest()
            if len(paragraph) > 30 and key in seen:
                continue
            seen.add(key)
            if not any(line.strip() in forbidden for line in paragraph.splitlines()):
                paragraphs.append(paragraph.rstrip())
        document = "\n\n".join(paragraphs).strip()
        if len(document) > 60:
            documents.append(document.encode("utf-8", "replace").decode())
    return documents


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE: any text round-trips, so bits per byte is well defined."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=2 * WINDOW,
    )


def stream(tokenizer, documents: list[str]) -> torch.Tensor:
    """Return all documents as one (tokens,) stream, each begun by the BOS token."""
    bos = tokenizer.bos_token_id
    pieces = []
    for start in range(0, len(documents), 4096):
        texts = documents[start : start + 4096]
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            pieces.append(bos)
            pieces.extend(ids)
    return torch.tensor(pieces, dtype=torch.int32)


@torch.inference_mode()
def bits_per_byte(model, tokenizer) -> float:
    """Return bits per byte of all topics, in windows of 512 tokens that do not see one another."""
    text = "\n\n".join(reference_topics())
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    nats = 0.0
    bos = torch.tensor([tokenizer.bos_token_id])
    for window in ids.split(WINDOW - 1):
        row = torch.cat([bos, window])[None]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(row).logits.float()
        nats += torch.nn.functional.cross_entropy(
            logits[0, :-1], row[0, 1:], reduction="sum"
        ).item()
    return nats / math.log(2) / len(text.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=8, help="windows of 512 tokens a step")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    documents = corpus()
    random.Random(args.seed).shuffle(documents)
    size = sum(len(document.encode()) for document in documents)
    tokenizer = train_tokenizer(documents)
    tokens = stream(tokenizer, documents)
    megabytes = size / 1e6
    millions = len(tokens) / 1e6
    print(
        f"corpus: {len(documents)} documents, {megabytes:.1f} MB, {millions:.2f} M tokens",
        flush=True,
    )

    config = LlamaConfig(
        **CONFIG, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
    )
    config.pad_token_id = tokenizer.pad_token_id
    model = LlamaForCausalLM(config)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.muon_lr, momentum=0.95, weight_decay=0.05),
        torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base = [args.muon_lr, args.adam_lr]
    print(f"model: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)

    def objective(batch):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch[:, :-1]).logits
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), batch[:, 1:].flatten()
        )

    compiled = torch.compile(objective)  # a quarter faster here; the mathematics is the same
    generator = torch.Generator().manual_seed(args.seed)
    step = 0
    mean: float | None = None
    order = torch.empty(0, dtype=torch.long)
    begin = time.monotonic()
    while (progress := (time.monotonic() - begin) / (60 * args.minutes)) < 1:
        if len(order) < args.batch:
            # a new epoch: windows from another offset, in another order
            offset = int(torch.randint(WINDOW, (1,), generator=generator))
            count = (len(tokens) - offset - 1) // WINDOW
            order = offset + WINDOW * torch.randperm(count, generator=generator)
        starts = order[: args.batch]
        order = order[args.batch :]
        batch = torch.stack([tokens[s : s + WINDOW + 1] for s in starts.tolist()]).long()
        rate = min(1.0, (step + 1) / 100, 2 * (1 - progress))
        for optimizer, lr in zip(optimizers, base, strict=True):
            optimizer.param_groups[0]["lr"] = lr * rate
        loss = compiled(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if step % 100 == 0:
            seen = step * args.batch * WINDOW
            speed = f"{seen / 1e6:.1f} M tokens  {seen / (time.monotonic() - begin):.0f}/s"
            print(f"step {step}  {progress:6.1%}  loss {mean:.3f}  {speed}", flush=True)
        if step % 500 == 0:
            save(model, tokenizer, args.output, {"unfinished": True})
            print(f"  held out: {bits_per_byte(model, tokenizer):.3f} bits per byte", flush=True)

    model.to(torch.bfloat16)  # what ships is what is measured
    recipe = {
        "corpus_bytes": size,
        "corpus_tokens": len(tokens),
        "tokens_seen": step * args.batch * WINDOW,
        "steps": step,
        "minutes": round((time.monotonic() - begin) / 60, 1),
        "bits_per_byte_topics": round(bits_per_byte(model, tokenizer), 4),
        "arguments": {k: v for k, v in vars(args).items() if k != "output"},
    }
    save(model, tokenizer, args.output, recipe)
    print(json.dumps(recipe, indent=2))


def save(model, tokenizer, output: Path, recipe: dict) -> None:
    """Write bfloat16 weights, tokenizer and recipe; training goes on in float32."""
    state = {
        name: tensor.detach().to(torch.bfloat16) for name, tensor in model.state_dict().items()
    }
    del state["lm_head.weight"]  # tied to the embedding
    model.config.dtype = torch.bfloat16
    model.save_pretrained(output, state_dict=state)
    tokenizer.save_pretrained(output)
    (output / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")


if __name__ == "__main__":
    main()
