"""Whether `mistral-7b compare` names what a broken converter did, and raises no false alarm.

    python experiments/compare_faults.py --json-file experiments/results/2026-11-30-compare-faults.json

Writes the bundled model with each mistake in each format (broken_converter.py), compares it with the original, and
checks verdict, cause and module; then pairs of sound files, which must all be noise.
"""

from __future__ import annotations

import datetime
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro
from broken_converter import FORMATS, Model, merged, noise_like, write_adapter
from commits import commit_of

from mistral_7b.checkpoint import convert, quantize
from mistral_7b.checkpoint.hub import DEMO
from mistral_7b.evaluation.comparison.result import Result
from mistral_7b.evaluation.comparison.run import compare
from mistral_7b.text.tokenizer import Tokenizer

MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
Change = Callable[[Model], None]
TOKENS, ROW = 640, 320  # rows longer than the window of 256
DATE = datetime.date.today().isoformat()


def configured(**values: Any) -> Change:
    return lambda model: model.config.update(values)


def tiled_heads(model: Model) -> None:
    """Key and value heads for each query head, but in the order 0 1 0 1."""
    heads, groups = model.config["num_attention_heads"], model.config["num_key_value_heads"]
    for n in model.layers():
        for name in ("k_proj", "v_proj"):
            key = f"model.layers.{n}.self_attn.{name}.weight"
            model.tensors[key] = model.tensors[key].repeat(heads // groups, 1)
    model.config["num_key_value_heads"] = heads


def exchanged_heads(model: Model) -> None:
    """The rows of v reshaped as (width, heads)."""
    groups = model.config["num_key_value_heads"]
    for n in model.layers():
        key = f"model.layers.{n}.self_attn.v_proj.weight"
        rows = model.tensors[key]
        model.tensors[key] = rows.view(groups, -1, rows.shape[1]).transpose(0, 1).reshape(rows.shape)


def swapped_norms(model: Model) -> None:
    for n in model.layers():
        a, b = (f"model.layers.{n}.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm"))
        model.tensors[a], model.tensors[b] = model.tensors[b], model.tensors[a]


def scaled_embedding(model: Model) -> None:
    key = "model.embed_tokens.weight"
    model.tensors[key] = (model.tensors[key].float() * model.config["hidden_size"] ** 0.5).to(torch.bfloat16)


def padded(model: Model) -> None:
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        if key in model.tensors:
            model.tensors[key] = torch.cat([model.tensors[key], torch.zeros_like(model.tensors[key][:64])])
    model.config["vocab_size"] += 64


def untied(model: Model) -> None:
    """An output of its own, as a converter leaves it that does not know of tied weights: freshly drawn."""
    table = model.tensors["model.embed_tokens.weight"]
    model.tensors["lm_head.weight"] = noise_like(table, 1.0, 5).to(table.dtype)
    model.config["tie_word_embeddings"] = False


def tied(model: Model) -> None:
    del model.tensors["lm_head.weight"]
    model.config["tie_word_embeddings"] = True


def without_bos(model: Model) -> None:
    model.add_bos = False


def templated(text: str) -> Change:
    def change(model: Model) -> None:
        model.template = text

    return change


def permuted(how: str) -> Change:
    def change(model: Model) -> None:
        model.permuted = how

    return change


# mistake -> the model it is made in, what is done, the cause and the module that are to be named
ATTENTION, NORM = "layers.0.attention", "layers.0.attention_norm"
FAULTS: dict[str, tuple[str, Change, str, str]] = {
    "q and k not permuted": ("demo", permuted("not"), "qk_not_permuted", f"{ATTENTION}.wq"),
    "k permuted with the query heads": ("demo", permuted("k as q"), "kv_head_count", f"{ATTENTION}.wk"),
    "key heads tiled": ("demo", tiled_heads, "kv_head_count", f"{ATTENTION}.wk"),
    "v reshaped wrongly": ("demo", exchanged_heads, "head_order", f"{ATTENTION}.wv"),
    "heads of half the width": (
        "demo", configured(num_attention_heads=8, num_key_value_heads=4, head_dim=32), "head_shape", ATTENTION
    ),
    "window ignored": ("demo", configured(sliding_window=None), "window_ignored", ATTENTION),
    "window off by one": ("demo", configured(sliding_window=257), "window_off_by_one", ATTENTION),
    "theta": ("demo", lambda model: model.set_theta(1e6), "rope_theta", ATTENTION),
    "norms swapped": ("demo", swapped_norms, "norms_swapped", NORM),
    "epsilon": ("demo", configured(rms_norm_eps=1e-6), "norm_eps", NORM),
    "output tied": ("untied", tied, "tied", "output"),
    "output untied": ("demo", untied, "untied", "output"),
    "embedding scaled": ("untied", scaled_embedding, "embedding_scale", "tok_embeddings"),
    "rows of padding": ("demo", padded, "padding_rows", "output"),
    "BOS missing": ("demo", without_bos, "bos_missing", "tokenizer"),
    "BOS doubled": ("template", templated("{{ bos_token }}" + MISTRAL), "bos_doubled", "chat template"),
    "chat template": ("template", templated(CHATML), "chat_template", "chat template"),
    "adapter not applied": ("adapter", lambda model: None, "adapter_not_applied", f"{ATTENTION}.wq"),
    "merged into another base": ("other base", lambda model: None, "wrong_base", "tok_embeddings"),
}  # fmt: skip


class Workshop:
    """The sound models, as files and in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        demo = Model.read(DEMO)
        demo.config = {**demo.config, "torch_dtype": "bfloat16"}
        free = demo.copy()
        table = demo.tensors["model.embed_tokens.weight"]
        free.tensors["lm_head.weight"] = (table.float() + noise_like(table, 0.2, 7)).to(table.dtype)
        free.config["tie_word_embeddings"] = False
        spoken = demo.copy()
        spoken.template = MISTRAL
        self.updates = write_adapter(folder / "adapter", demo)
        other = demo.copy()
        for seed, (name, t) in enumerate(demo.tensors.items()):
            if t.dim() > 1:
                other.tensors[name] = (t.float() + noise_like(t, 0.1, seed)).to(t.dtype)
        self.models = {
            "demo": demo, "untied": free, "template": spoken, "adapter": demo,
            "other base": merged(other, self.updates), "merged": merged(demo, self.updates),
        }  # fmt: skip
        self.like = folder / "like.gguf"
        convert(DEMO, self.like, "gguf")
        demo_folder = str(DEMO)
        self.sources = dict.fromkeys(self.models, demo_folder)
        self.sources |= dict.fromkeys(("adapter", "other base", "merged"), f"{demo_folder}+{folder / 'adapter'}")
        self.sources["untied"] = str(free.write(folder / "untied", "huggingface"))
        self.sources["template"] = str(spoken.write(folder / "template", "huggingface"))

    def write(self, name: str, format: str, change: Change = lambda model: None) -> Path:
        model = self.models[name].copy()
        change(model)
        return model.write(self.folder / f"b{time.monotonic_ns()}", format, self.like)

    def sound(self) -> dict[str, tuple[str, str]]:
        """Pairs of sound files: A and B."""
        f, demo = self.folder, str(DEMO)
        out: dict[str, tuple[str, str]] = {}
        for name in ("demo", "untied", "template", "merged"):
            for format in FORMATS:
                out[f"{name}, {format}"] = (self.sources[name], str(self.write(name, format)))
        for kind in ("f32", "f16", "bf16", "q8_0", "q4_0", "q6_k", "q4_k_m"):
            convert(DEMO, f / f"{kind}.gguf", "gguf", type=kind)
            out[f"demo, our {kind}"] = (demo, str(f / f"{kind}.gguf"))
        convert(DEMO, f / "ours", "mistral")
        convert(f / "ours", f / "back", "huggingface")
        convert(f / "q8_0.gguf", f / "dequantized", "huggingface")
        tokens = torch.tensor([Tokenizer.from_pretrained(demo).encode("def f(x):\n    return x\n" * 20)])
        for scheme in ("int8", "q4_k_m", "int4"):
            quantize(demo, f / scheme, scheme, tokens, "code")
        quantize(demo, f / "calibrated", "int4", tokens, "code", calibration_tokens=tokens.tolist())
        heads = self.write("demo", "huggingface", repeated_heads)
        return out | {
            "demo, itself": (demo, demo),
            "Mistral's format, ours": (demo, str(f / "ours")),
            "and back": (demo, str(f / "back")),
            "Q8_0, dequantized": (str(f / "q8_0.gguf"), str(f / "dequantized")),
            "demo, int8": (demo, str(f / "int8")),
            "demo, q4_k_m": (demo, str(f / "q4_k_m")),
            "demo, int4": (demo, str(f / "int4")),
            "demo, int4 calibrated": (demo, str(f / "calibrated")),
            "int8, int4": (str(f / "int8"), str(f / "int4")),
            "Q4_0, Q4_K_M": (str(f / "q4_0.gguf"), str(f / "q4_k_m.gguf")),
            "key heads repeated": (demo, str(heads)),
            "with an adapter, itself": (self.sources["adapter"], self.sources["adapter"]),
            "with an adapter, over Q8_0": (self.sources["adapter"], f"{f / 'q8_0.gguf'}+{f / 'adapter'}"),
            "merged, with the adapter": (str(self.write("merged", "huggingface")), self.sources["merged"]),
        }


def repeated_heads(model: Model) -> None:
    """Key and value heads for each query head, in the right order 0 0 1 1: the same function."""
    heads, groups = model.config["num_attention_heads"], model.config["num_key_value_heads"]
    for n in model.layers():
        for name in ("k_proj", "v_proj"):
            key = f"model.layers.{n}.self_attn.{name}.weight"
            split = model.tensors[key].view(groups, -1, model.config["hidden_size"])
            model.tensors[key] = split.repeat_interleave(heads // groups, 0).flatten(0, 1)
    model.config["num_key_value_heads"] = heads


def record(result: Result) -> dict[str, Any]:
    causes = [
        {"cause": c.cause, "module": c.module, "before": c.before, "after": c.after, "proved": c.proved}
        for c in result.causes
    ]
    return {
        "verdict": result.verdict, "parts_at": result.parts_at, "kld": result.kld,
        "expected_kld": result.expected_kld, "causes": causes, "unexplained": len(result.unexplained),
        "worst": {"tensor": result.rounding.name, "error": result.rounding.error, "bound": result.rounding.bound},
    }  # fmt: skip


def main(json_file: Path | None = None, only: str = "", formats: tuple[str, ...] = FORMATS) -> None:
    """Make every mistake in every format, and compare all sound pairs.

    Args:
        json_file: Write the record to this file.
        only: Mistakes and pairs whose names contain this.
        formats: Formats of the files with mistakes.
    """
    records: list[dict[str, Any]] = []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        shop = Workshop(Path(place))
        for mistake, (name, change, cause, module) in FAULTS.items():
            for format in formats:
                if only not in mistake:
                    continue
                out = compare(shop.sources[name], shop.write(name, format, change), tokens=TOKENS, row=ROW)
                found = record(out)
                named = [c for c in found["causes"] if c["proved"]]
                right = len(named) == len(found["causes"]) == 1 and named[0]["cause"] == cause
                right = right and out.verdict == "fault" and out.parts_at == module and not out.unexplained
                records.append({"fault": mistake, "format": format, "named": right, **found})
                print(f"{'ok   ' if right else 'WRONG'} {mistake:<32} {format:<12} {found}", flush=True)
        for pair, (a, b) in shop.sound().items() if only in "sound" else ():
            found = record(compare(a, b, tokens=TOKENS, row=ROW))
            right = found["verdict"] == "noise"
            records.append({"sound": pair, "named": right, **found})
            print(f"{'ok   ' if right else 'ALARM'} {pair:<32} {found}", flush=True)
    faults, sound = ([r for r in records if kind in r] for kind in ("fault", "sound"))
    plain = [r for r in faults if r["format"] in FORMATS[:3]]
    summary = {
        "named": sum(r["named"] for r in plain), "faults": len(plain),
        "named in Q4_0": sum(r["named"] for r in faults) - sum(r["named"] for r in plain),
        "faults in Q4_0": len(faults) - len(plain),
        "false alarms": sum(not r["named"] for r in sound), "sound pairs": len(sound),
        "seconds": round(time.perf_counter() - start),
    }  # fmt: skip
    print(json.dumps(summary))
    if json_file is None:
        return
    cpu = next(x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name"))
    about = {
        "date": DATE, "commit": commit_of(), "command": "python " + " ".join(sys.argv),
        "cpu": cpu.split(":")[1].strip(), "model": "demo", "tokens": TOKENS, "row": ROW,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }  # fmt: skip
    json_file.write_text(json.dumps(about | {"summary": summary, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
