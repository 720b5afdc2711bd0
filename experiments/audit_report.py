"""The tables of the audit, and their place in a page of documentation."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

BEGIN, END = "<!-- audit:begin -->", "<!-- audit:end -->"


def tables(
    found: Iterable[Mapping[str, Any]], caught: Iterable[Mapping[str, Any]], level: float
) -> str:
    """The report in Markdown.

    Args:
        found: what `audit.audit` found of each case.
        caught: what `audit.run_mutants` found of each mutant.
        level: probability that any of the bounds is too high by chance.
    """
    lines = [
        "| case | against | protected | stated epsilon | bound | must be at least | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    trials = 0
    for case in found:
        is_finite, trials = math.isfinite(case["theory"]), case["trials"]
        stated = f"{case['theory']:.2f}" if is_finite else "infinite"
        floor = f"{case['floor']:.2f}" if is_finite else "more than a smaller canary's"
        lines.append(
            f"| `{case['case']}` | {case['adversary']} | {case['unit']} | {stated} | "
            f"{case['bound']:.2f} | {floor} | {case['verdict']} |"
        )
    head = (
        f"{trials} trials of each world a case, delta 1e-5; all bounds hold together with "
        f"{1 - level:.0%} confidence. Sampled cases are bounded for any law, which is weaker, and "
        "need only be above 0."
    )
    text = "\n".join([head, "", *lines])
    rows = [
        f"| `{m['mutant']}` | {m['description']} | "
        f"{'<br>'.join(f'`{n}`' for n in m['caught_by'])} | "
        f"{'**no**: ' + m['survived'].splitlines()[0] if m['survived'] else 'yes'} |"
        for m in caught
    ]
    if rows:
        text += (
            "\n\nOne rule broken at a time; the named tests pass without the mutant and must fail "
            "with it, by their assertion.\n\n| mutant | what is broken | seen by | caught |\n"
            "| --- | --- | --- | --- |\n" + "\n".join(rows)
        )
    return text + "\n"


def with_tables(page: str, text: str) -> str:
    """The page with `text` between its markers.

    Raises:
        ValueError: the page has no such markers.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"Expected one {BEGIN} and one {END} after it in the --docs file.")
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n\n{text}\n{END}{rest.split(END)[1]}"
