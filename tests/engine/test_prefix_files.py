"""Files of KV pages: damaged, full, bounded, shared by processes that may be killed."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from full_disk import Full
from test_prefix_cache_disk import PAGE, PROMPT, ask, config_of, files_in, filled, model_of, restarted, said
from tiny import tokens_of

from mistral_7b.engine.disk_files import HEADER, PageFiles
from mistral_7b.engine.llm import LLM

__all__ = ["filled"]  # a fixture
SPACE = "0" * 16


def key(n: int) -> bytes:
    return n.to_bytes(32, "big")


def write(files: PageFiles, n: int, now: int | None = None) -> int:
    return files.write(key(n), memoryview(bytes([n]) * 100), n if now is None else now)


def read(files: PageFiles, n: int) -> bool:
    contents = bytearray(100)
    found = files.read(key(n), memoryview(contents))
    assert not found or bytes(contents) == bytes([n]) * 100
    return found


def test_a_page_is_read_as_it_was_written(tmp_path: Path) -> None:
    files = PageFiles(tmp_path / "new", SPACE, 100, 10_000)
    assert not read(files, 1)
    assert write(files, 1) == HEADER + 100
    assert write(files, 1) == 0, "it is there"
    assert read(files, 1)
    assert read(PageFiles(tmp_path / "new", SPACE, 100, 10_000), 1)
    (path,) = files_in(tmp_path / "new")
    assert path.stat().st_mode & 0o077 == 0, "others can read what was prompted"


def damaged(kind: str, path: Path, other: Path) -> None:
    data = path.read_bytes()
    if kind == "a byte":
        path.write_bytes(data[:-7] + bytes([data[-7] ^ 4]) + data[-6:])
    elif kind == "the header":
        path.write_bytes(b"?" + data[1:])
    elif kind == "truncated":
        path.write_bytes(data[:-1])
    elif kind == "longer":
        path.write_bytes(data + b"1")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "zeros":
        path.write_bytes(bytes(len(data)))
    else:
        path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("kind", ["a byte", "the header", "truncated", "longer", "empty", "zeros", "another's"])
def test_a_damaged_file_is_removed_and_its_page_computed(kind: str, filled: Path) -> None:
    wanted = said(ask(LLM(model_of("int8"), config_of(None))))
    paths = files_in(filled)
    for i, path in enumerate(paths):
        damaged(kind, path, paths[i - 1])
    llm = restarted(filled)
    output = ask(llm)
    assert said(output) == wanted
    assert output.num_cached_tokens == 0
    for _ in range(
        2
    ):  # reading ends at the first damaged page, which is then written again: two are in the window
        llm = restarted(filled, before=llm)
        output = ask(llm)
        assert said(output) == wanted
    assert output.num_cached_tokens == 40


def test_a_folder_that_vanishes_is_no_error(filled: Path) -> None:
    llm = restarted(filled)
    for path in files_in(filled):
        path.unlink()
    files_in(filled)
    next(filled.iterdir()).rmdir()
    assert ask(llm).num_cached_tokens == 0
    assert ask(restarted(filled, before=llm)).num_cached_tokens == 40


def test_the_bound_holds_and_the_last_used_stay(tmp_path: Path) -> None:
    files = PageFiles(tmp_path, SPACE, 100, 10 * (HEADER + 100))
    for n in range(1, 41):
        if n > 8:
            files.touch([key(8)], n * 10**9)
        write(files, n, n * 10**9)
        assert sum(p.stat().st_size for p in files_in(tmp_path)) <= files.most
    assert read(files, 8)
    assert [read(files, n) for n in (1, 7, 9, 40)] == [False, False, False, True]
    PageFiles(tmp_path, "1" * 16, 100, 5 * (HEADER + 100)).trim()  # another model's, and a smaller bound
    assert 1 <= len(files_in(tmp_path)) <= 5
    assert read(files, 40)


def test_a_prefix_shrinks_from_its_end(tmp_path: Path) -> None:
    llm = restarted(tmp_path, "int8 without a window")
    ask(llm)
    llm.engine.scheduler.close()
    size = files_in(tmp_path)[0].stat().st_size
    PageFiles(tmp_path, SPACE, 100, 5 * size).trim()
    assert 3 <= len(files_in(tmp_path)) <= 5
    again = restarted(tmp_path, "int8 without a window")
    assert ask(again).num_cached_tokens >= 3 * PAGE


def test_nothing_else_in_the_folder_is_touched(tmp_path: Path) -> None:
    mine = [
        tmp_path / "a" / "screen.kv",
        tmp_path / SPACE / "notes.kv",
        tmp_path / ".x.partial",
        tmp_path / "b.kv",
    ]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(5000))
        os.utime(path, (1, 1))
    files = PageFiles(tmp_path, SPACE, 100, 1000)
    for n in range(20):
        write(files, n)
    assert all(path.exists() for path in mine)


@pytest.mark.parametrize("room", range(6))
def test_a_full_disk_ends_the_writing_and_nothing_else(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    llm = restarted(tmp_path)
    wanted = said(ask(LLM(model_of("int8"), config_of(None))))
    monkeypatch.setattr("builtins.open", Full(room, tmp_path))
    with caplog.at_level(logging.WARNING, "mistral_7b.engine"):
        assert said(ask(llm)) == wanted
        assert said(ask(llm, tokens_of((20,), seed=9).tolist()))
        llm.engine.scheduler.close()
    assert len(caplog.records) == 1
    assert len(files_in(tmp_path)) == room // 3, "a header, contents, and the closing"
    assert not list(tmp_path.glob("**/.*")), "half of a file is left"
    monkeypatch.undo()
    output = ask(restarted(tmp_path))
    assert said(output) == wanted


CHILD = """
    import os, sys
    sys.path[:0] = {path!r}
    import torch
    torch.set_num_threads(1)
    from test_prefix_cache_disk import LLM, PROMPT, ask, config_of, model_of, restarted, said, tokens_of
    from pathlib import Path
    """


def child(body: str, folder: Path) -> subprocess.Popen[str]:
    """A process of its own that has `folder`."""
    head = textwrap.dedent(CHILD).format(path=sys.path) + f"folder = Path({str(folder)!r})\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + textwrap.dedent(body)], stdout=subprocess.PIPE, text=True
    )


def test_a_process_that_is_killed_while_it_writes_leaves_a_good_folder(tmp_path: Path) -> None:
    body = """
        import time
        replace, times = os.replace, []
        def stop(source, target):
            times.append(1)
            if len(times) == 4:
                print("writing", flush=True)
                time.sleep(600)
            replace(source, target)
        os.replace = stop
        llm = restarted(folder)
        ask(llm)
        time.sleep(600)
    """
    process = child(body, tmp_path)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    assert len(files_in(tmp_path)) == 3
    assert len(list(tmp_path.glob("*/.*.partial"))) == 1
    llm = restarted(tmp_path)
    output = ask(llm)
    assert said(output) == said(ask(LLM(model_of("int8"), config_of(None))))
    assert output.num_cached_tokens == 12
    llm.engine.scheduler.close()
    assert not list(tmp_path.glob("*/.*.partial"))
    assert len(files_in(tmp_path)) == 10


@pytest.mark.slow
def test_processes_share_a_folder_that_is_too_small_for_both(tmp_path: Path) -> None:
    body = """
        prompts = [[*PROMPT[:20], *tokens_of((20,), seed=seed).tolist()] for seed in range(6)]
        model = model_of("int8")
        for _ in range(4):
            llm = LLM(model, config_of(folder, prefix_cache_bytes=40_000))
            outputs = [said(ask(llm, prompt)) for prompt in prompts]
            llm.engine.scheduler.close()
            print(outputs, flush=True)
    """
    processes = [child(body, tmp_path) for _ in range(2)]
    texts = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    plain = LLM(model_of("int8"), config_of(None))
    prompts = [[*PROMPT[:20], *tokens_of((20,), seed=seed).tolist()] for seed in range(6)]
    line = str([said(ask(plain, prompt)) for prompt in prompts])
    assert [text.splitlines() for text in texts] == [[line] * 4] * 2
    total = sum(path.stat().st_size for path in files_in(tmp_path))
    assert 0 < total <= 40_000 * 1.1
    assert not list(tmp_path.glob("*/.*.partial"))
