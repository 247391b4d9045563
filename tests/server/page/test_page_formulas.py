"""LaTeX formulas in answers: drawn as MathML, also while they stream, and harmless."""

from __future__ import annotations

import json
from typing import Any

from tests.server.page.browser import answer, ask, asked
from tests.server.page.scripted import ANSWERS

MATH = ".assistant .formula math"


def test_formulas_are_drawn_and_prices_are_not(page: Any) -> None:
    ask(page, "formulas")
    page.wait_for_selector(f"{MATH} >> nth=6")
    text = answer(page).locator(".text")
    assert text.locator("h3").inner_text() == "Attention"  # an answer's headings rank below the page's
    assert page.locator(MATH).count() == 7
    assert text.locator(".display math[display=block]").count() == 2
    assert text.locator("msqrt").count() == 2
    assert text.locator("mtable").count() == 2
    assert "costs $5 and not $10, or US$3 (about 2$), and $x$ is code" in text.inner_text()
    assert text.locator("li .formula.open").inner_text() == "\\(\\oops{x}\\)"  # invalid: its source
    assert text.locator("ul").count() == 1  # the line that begins with a minus is part of a formula
    assert text.locator("em").count() == 0


def test_a_formula_is_tinted_as_its_least_likely_token_and_branches(page: Any) -> None:
    ask(page, "formulas")
    formula = page.wait_for_selector(".tex.tok >> nth=1")
    i = int(formula.get_attribute("data-i"))
    formula.hover()
    page.wait_for_selector("#alternatives:not([hidden])")
    page.click("#alternatives button:has-text('·never')")
    page.wait_for_selector(".siblings >> text=2 / 2")
    page.wait_for_selector(".assistant[aria-busy=false]")
    sent = asked(page)[-1]["messages"][-1]["content"]
    assert sent.startswith("# Attention\n\nA query \\(q_i\\) meets the keys \\(")
    assert sent.endswith(" never")
    assert page.locator(f"[data-i='{i}'].tok").count() <= 1


PREFIXES = """async text => {
    const { Rendered } = await import("/web/markdown.js");
    const root = document.createElement("div");
    const view = new Rendered(root);
    view.show("$x$");
    if (!root.querySelector("math")) await new Promise(done => { view.onload = done; });
    const states = [];
    let display = null;
    for (let end = 1; end <= text.length; end++) {
        view.show(text.slice(0, end));
        if (view.source.includes("costs")) display ??= root.querySelector(".display math");
        const copy = root.cloneNode(true);
        copy.querySelectorAll(".formula, code").forEach(e => e.remove());
        states.push([root.querySelectorAll("math").length, copy.textContent.match(/\\\\(frac|sqrt|begin|dots)/)]);
    }
    return [states, root.contains(display)];
}"""


def test_a_formula_that_streams_does_not_flicker(page: Any) -> None:
    """In no state of a growing answer does a formula go back to its source, or its source become Markdown."""
    states, same = page.evaluate(PREFIXES, ANSWERS["formulas"])
    counts = [count for count, _ in states]
    assert counts == sorted(counts)
    assert counts[-1] == 7
    assert not any(bare for _, bare in states)
    assert same, "a formula in a finished block was drawn again"
    ask(page, "slow formulas", wait=False)
    page.wait_for_selector(".assistant[aria-busy=true] .formula math")  # drawn while the answer streams


CASES = {
    r"\(x\)": 1, r"a \[x\] b": 1, "$$x$$": 1, "$x$, $5$ and $a_1 = 5$": 3, r"$x$ $y$": 2, "**$a*b$** and $a*b$": 2,
    "> $$\n> a\n> $$": 1, r"| a |\n|---|\n| $x_1$ |".replace(r"\n", "\n"): 1, r"`\(x\)`": 0, "```\n$$x$$\n```": 0,
    "$5 and $10": 0, "$5-$10": 0, "$5 or pay 10$": 0, "$20 to 30$": 0, "A$5, B$6": 0, r"\$x\$": 0,
    "$HOME and $PATH": 0, "$ x $": 0, r"\(x" + "\n\nnext": 0, r"\\(x\\)": 0, "a $x": 0,
    r"$$\text{a} \quad \sin x \cos y$$": 1,
    r"$x \in A \text{ if not so}$": 1, r"\(\underbrace{a}_{b} \cancel{x} \boxed{y} \sideset{}{'}\sum \pmb{x}\)": 1,
}  # fmt: skip
SHOW = """async text => {
    const { Rendered } = await import("/web/markdown.js");
    const root = document.createElement("div");
    const view = new Rendered(root);
    view.show(text);
    if (root.querySelector(".formula:not(.open)") && !root.querySelector("math"))
        await new Promise(done => { view.onload = () => { view.again(); done(); }; });
    return [root.querySelectorAll("math").length, root.textContent,
            [...root.querySelectorAll(".formula.open")].map(e => e.textContent)];
}"""


def test_what_is_a_formula(page: Any) -> None:
    page.evaluate("import('/web/vendor/temml.js')")
    wrong = {}
    for text, count in CASES.items():
        drawn, *_ = page.evaluate(SHOW, text)
        if drawn != count:
            wrong[text] = drawn
    assert wrong == {}
    assert page.evaluate(SHOW, "so \\(a_1 + b_")[2] == ["\\(a_1 + b_"]  # incomplete: its source


EVIL = (
    r"\href{javascript:window.hurt=1}{x}", r"\url{javascript:window.hurt=1}", r"\includegraphics{x.png}",
    r"\class{main}{x}", r"\id{ask}{x}", r"\style{position:fixed}{x}", r"\data{i=1}{x}", r"\label{ask} x",
    r"\begin{equation} x \label{ask} \end{equation}", r"x \ref{ask}", r"\text{<img src=x onerror=window.hurt=1>}",
    r"\def\x{\x\x}\x", r"\rule{9999em}{9999em}", "</math><img src=x onerror=window.hurt=1>", r"\toString{x}",
    r"\textcolor{url(//example.org)}{x}", r"\colorbox{red;position:fixed}{x}", r"\__proto__", r"\hskip{1e9em} x",
)  # fmt: skip


def test_no_formula_does_harm(page: Any) -> None:
    loaded: list[str] = []
    page.on("request", lambda request: loaded.append(request.url))
    content = "\n\n".join(f"\\[ {tex} \\]\n\nand ${tex}$ or \\( {tex} \\)" for tex in EVIL)
    message = {"id": "b", "parent": None, "role": "assistant", "content": content, "created": 1, "state": "done"}
    conversation = {"title": "x", "chosen": {}, "created": 1, "messages": [message], "settings": {}}
    file = {"format": "mistral-7b conversations", "version": 1, "conversations": [conversation]}
    page.set_input_files(
        "#file", {"name": "x.json", "mimeType": "application/json", "buffer": json.dumps(file).encode()}
    )
    page.wait_for_selector(MATH)
    bad = "a, img, script, [href], [src], [id], [onerror], .main, [data-i]"
    assert page.locator(f".assistant .text :is({bad})").count() == 0
    assert page.evaluate("window.hurt") is None
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert all(url.startswith(page.url.split("/#")[0]) for url in loaded)
