"""The training loop: gradients, accumulation, resuming, reported loss."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from refusals import refused

from mistral_7b import Mistral7B, ModelArgs, TrainingError
from mistral_7b.cache import Stateless
from mistral_7b.training import TrainArgs, train
from mistral_7b.training import loss as loss_module
from mistral_7b.training.data import IGNORE, PackedDocuments
from mistral_7b.training.loss import bits_per_byte, document_nll, loss_backward
from mistral_7b.training.trainer import Trainer
from mistral_7b.training.vocabulary import train_vocabulary

TINY = TrainArgs(
    dim=32, n_layers=2, head_dim=8, hidden_dim=48, n_heads=4, n_kv_heads=2, sliding_window=8,
    steps=6, seq_len=24, rows=8, warmup=2, lr=1e-2, dtype="float32", save_every=100,
)  # fmt: skip


def tiny_trainer(**changes: object) -> Trainer:
    args = dataclasses.replace(TINY, **changes)  # type: ignore[arg-type]
    shape = {f.name: getattr(args, f.name) for f in dataclasses.fields(ModelArgs) if hasattr(args, f.name)}
    torch.manual_seed(args.seed)
    model = Mistral7B(ModelArgs(vocab_size=50, **shape), dtype=getattr(torch, args.dtype), device="cpu")
    draw = torch.Generator().manual_seed(9)
    documents = [torch.randint(3, 50, (n,), generator=draw).tolist() for n in (30, 7, 55, 80, 12, 41, 66, 5)]
    return Trainer(args, model, PackedDocuments(documents, args.seq_len, args.seed))


def test_chunked_loss_and_gradients_are_those_of_plain_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "LOGITS", 7 * 50)  # rows of 7, which does not divide the number of tokens
    model = tiny_trainer().model.double()
    tokens = torch.randint(0, 50, (2, 24))
    targets = torch.randint(0, 50, (2, 24)).masked_fill(torch.rand(2, 24) < 0.3, IGNORE)
    wanted = F.cross_entropy(model(tokens, Stateless(8))[0].flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    gradients = torch.autograd.grad(wanted, list(model.parameters()))
    n = int((targets != IGNORE).sum())
    got = loss_backward(model, model.hidden(tokens, Stateless(8)), targets, n)
    assert float(got) == pytest.approx(wanted.item(), abs=1e-6)  # summed in float32
    for p, g in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, g, atol=1e-12, rtol=1e-10)


def test_trap_20_one_part_of_eight_rows_is_eight_parts_of_one() -> None:
    """Parts have unequal numbers of targets, so that a mean of means would differ."""
    gradients = []
    for accumulate in (1, 8):
        trainer = tiny_trainer(accumulate=accumulate)
        targets = trainer.method.data.rows(0, 8).targets
        counts = {int((row != IGNORE).sum()) for row in targets}
        assert len(counts) > 1
        record = trainer.update()
        gradients.append((record["norm"], record["loss"], [m.clone() for m in trainer.weights.masters]))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-5)
    assert gradients[0][1] == pytest.approx(gradients[1][1], rel=1e-6)


def test_trap_20_editing_one_document_leaves_the_next_bit_equal() -> None:
    trainer = tiny_trainer()
    tokens = torch.randint(3, 50, (1, 24))
    ids = torch.tensor([[0] * 11 + [1] * 13])
    edited = tokens.clone()
    edited[0, 4] = (edited[0, 4] + 1) % 50
    before, after = (trainer.model(t, Stateless(8), ids)[0] for t in (tokens, edited))
    assert before[0, 11:].equal(after[0, 11:])
    assert not before[0, 5:11].equal(after[0, 5:11])
    joined = trainer.model(edited, Stateless(8))[0]
    assert not joined[0, 11:].equal(after[0, 11:]), "without ids the second document would see the first"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_gives_the_same_bits(tmp_path: Path, optimizer: str) -> None:
    whole, first, second = (tiny_trainer(optimizer=optimizer, dtype="bfloat16") for _ in range(3))
    for _ in range(6):
        whole.update()
    for _ in range(3):
        first.update()
    first.save(tmp_path / "state.pt")
    second.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(3):
        second.update()
    for a, b in zip(
        whole.weights.masters + whole.weights.weights, second.weights.masters + second.weights.weights, strict=True
    ):
        assert a.equal(b)


def test_training_learns_what_repeats() -> None:
    trainer = tiny_trainer(steps=60)
    trainer.method.data = PackedDocuments([list(range(3, 40)) * 3] * 4, TINY.seq_len, 0)
    losses = [trainer.update()["loss"] for _ in range(60)]
    assert losses[0] > 3.5
    assert losses[-1] < 0.5


def test_warm_up_then_cosine() -> None:
    args = dataclasses.replace(TINY, steps=110, warmup=10, final_lr=0.1)
    rates = [args.learning_rate(s) for s in range(110)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[109] == pytest.approx(0.1, abs=1e-3)


def test_gradients_are_clipped_to_the_norm() -> None:
    trainer = tiny_trainer(clip=1e-3)
    seen: list[float] = []
    adamw = trainer.weights.optimizers[0]
    adamw.register_step_pre_hook(
        lambda *_: seen.append(math.sqrt(sum(float(m.grad.square().sum()) for m in trainer.weights.masters)))
    )
    record = trainer.update()
    assert record["norm"] > 1e-3
    assert seen == [pytest.approx(1e-3, rel=1e-4)]


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_masters() -> None:
    trainer = tiny_trainer(dtype="bfloat16")
    with torch.no_grad():
        trainer.weights.weights[0].fill_(float("nan"))
    before = [m.clone() for m in trainer.weights.masters]
    with refused(TrainingError, field="lr"):
        trainer.update()
    assert all(a.equal(b) for a, b in zip(before, trainer.weights.masters, strict=True))


def test_bits_per_byte_is_nats_over_bytes_by_hand() -> None:
    model = tiny_trainer().model
    documents = [([1, 5, 9, 30, 2, 8, 41, 7, 7, 7, 12, 3, 4, 5, 6, 10, 11, 13, 17, 19], 33), ([1, 4, 6], 5)]
    nats = 0.0
    for tokens, _ in documents:
        probabilities = model(torch.tensor([tokens]))[0][0].detach().double().softmax(-1)
        nats -= sum(math.log(float(probabilities[i, t])) for i, t in enumerate(tokens[1:]))
    assert sum(document_nll(model, t) for t, _ in documents) == pytest.approx(nats, rel=1e-5)
    assert bits_per_byte(model, documents) == pytest.approx(nats / math.log(2) / 38, rel=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary of a few hundred tokens and some text to train on."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(6):
        lines = (f"def f{j}(x):\n    return x * {j % 7} + {i}\n\n" for j in range(60))
        (folder / f"{i}.py").write_text("".join(lines))
    train_vocabulary([p.read_text() for p in folder.glob("*.py")], 310, folder / "tokenizer.model.v3")
    return folder


def run_args(folder: Path, out: Path, **changes: object) -> TrainArgs:
    text = [str(folder / f"{i}.py") for i in range(6)]
    given = {
        "out": str(out),
        "data": tuple(text[:5]),
        "held_out": (text[5],),
        "tokenizer": str(folder / "tokenizer.model.v3"),
    }
    return dataclasses.replace(TINY, **{**given, **changes})  # type: ignore[arg-type]


def test_a_run_from_text_to_a_model_that_opens(folder: Path, tmp_path: Path) -> None:
    shown: list[dict] = []
    args = run_args(folder, tmp_path / "run", steps=30, eval_every=10)
    last = train(args, show=shown.append)
    assert [r["step"] for r in shown] == list(range(1, 31))
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [r["held_out_bits_per_byte"] for r in log if "held_out_bits_per_byte" in r][-1] == last[
        "held_out_bits_per_byte"
    ]
    assert log[29]["held_out_bits_per_byte"] < log[9]["held_out_bits_per_byte"]
    assert (tmp_path / "run" / "curve.png").read_bytes().startswith(b"\x89PNG")
    model = Mistral7B.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    assert model.args.sliding_window == 8
    assert (tmp_path / "run" / "model" / "tokenizer.model.v3").exists()


def test_held_out_files_of_the_data_are_left_out_and_counted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    for i in range(6):
        (tmp_path / "in" / f"{i}.py").write_bytes((folder / f"{i}.py").read_bytes())
    kept = str(tmp_path / "in" / "5.py")
    apart = run_args(tmp_path / "in", tmp_path / "apart", tokenizer=str(folder / "tokenizer.model.v3"))
    within = dataclasses.replace(apart, out=str(tmp_path / "within"), data=(str(tmp_path / "in"),))
    for args in (apart, within):
        train(args, show=lambda record: None)
    said = capsys.readouterr().err
    assert said == "held-out files of --data, excluded from training: 1\n"
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("apart", "within")]
    assert weights[0] == weights[1]
    with refused(TrainingError, field="held_out"):
        train(dataclasses.replace(within, out=str(tmp_path / "none"), data=(kept,)))
    assert not (tmp_path / "none").exists()


def test_an_interrupted_run_goes_on_and_ends_in_the_same_bits(folder: Path, tmp_path: Path) -> None:
    class Stop(KeyboardInterrupt):
        pass

    def stop_at_four(record: dict) -> None:
        if record["step"] == 4:
            raise Stop

    for name, show in (("whole", None), ("cut", stop_at_four)):
        args = run_args(folder, tmp_path / name)
        if show:
            with pytest.raises(Stop):
                train(args, show=show)
        train(args, show=lambda record: None)
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_a_state_of_another_run_is_refused(folder: Path, tmp_path: Path) -> None:
    train(run_args(folder, tmp_path / "run", steps=2), show=lambda record: None)
    with refused(TrainingError, field="lr", place=tmp_path / "run" / "state.pt"):
        train(run_args(folder, tmp_path / "run", steps=2, lr=0.5))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"steps": 0}, "steps"),
        ({"lr": float("nan")}, "lr"),
        ({"accumulate": 3}, "rows"),
        ({"warmup": 7}, "warmup"),
    ],
)
def test_arguments_that_cannot_be_are_refused_by_name(changes: dict, field: str) -> None:
    with refused(TrainingError, field=field):
        dataclasses.replace(TINY, **changes)


def test_no_data_is_refused(tmp_path: Path) -> None:
    with refused(TrainingError, field="data"):
        train(dataclasses.replace(TINY, out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:there is no tokenizer.model")
def test_quantized_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    shape = {"dim": 32, "n_layers": 1, "head_dim": 8, "hidden_dim": 64, "n_heads": 4, "n_kv_heads": 2}
    model = Mistral7B(ModelArgs(vocab_size=32768, sliding_window=None, rope_theta=1e6, **shape))
    model.save_pretrained(tmp_path / "x.gguf", format="gguf", type="q8_0")
    with refused(TrainingError, field="init"):
        train(run_args(folder, tmp_path / "run", init=str(tmp_path / "x.gguf")))


def test_a_model_of_no_run_here_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").touch()
    with refused(TrainingError, field="out"):
        train(run_args(folder, tmp_path))
    assert (tmp_path / "model" / "mine").exists()


def test_the_vocabulary_is_one_of_mistrals_v3(folder: Path) -> None:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    tokenizer = MistralTokenizer.from_file(str(folder / "tokenizer.model.v3")).instruct_tokenizer.tokenizer
    names = ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"]
    assert [tokenizer.get_special_token(n) for n in names] == [3, 4, 5, 6, 7, 8]
    text = "def f(x):\n\n    return x  # [INST] 12345 é\n"
    assert tokenizer.decode(tokenizer.encode(text, bos=False, eos=False)) == text
    with refused(TrainingError, field="vocab_size"):
        train_vocabulary(["a b c"], 4000, folder / "no")
    assert not (folder / "no").exists()
