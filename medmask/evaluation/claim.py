"""Answer, in words, the claim that was written down before the run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medmask.evaluation.cells import Cell, Measure, difference, measure_cells, partner, select_cells
from medmask.evaluation.statistics import Estimate


@dataclass(frozen=True)
class Answer:
    """The claim, how it was tested, one word for it, and a sentence for each pair of cells."""

    claim: str
    test: str
    word: str
    sentences: list[str]


def answer_claim(claim: dict[str, Any] | None, cells: Sequence[Cell], draws: int) -> Answer | None:
    """Replicated, not replicated, undecided at this n, or incomplete; None where no claim was written down."""
    if claim is None:
        return None
    measure = Measure(claim["metric"], claim["test_set"], claim["selection"])
    wheres = claim["where"], {**claim["where"], **claim["against"]}
    a, b = (select_cells(cells, row, where) for row, where in zip(claim["contrast"], wheres, strict=True))
    measure_cells([*a, *b], measure, draws)
    pairs = [(cell, other) for cell in a if (other := partner(cell, b)) is not None]
    answers = [answer_pair(cell, other, claim["margin"], measure) for cell, other in pairs]
    first, second = (
        row + "".join(f", {name} {value}" for name, value in where.items())
        for row, where in zip(claim["contrast"], wheres, strict=True)
    )
    sentences = [
        f"{cell.name} minus {other.name}: {word}. {sentence}"
        for (cell, other), (word, sentence) in zip(pairs, answers, strict=True)
    ]
    return Answer(
        claim.get("text") or f"{first} is better than {second}",
        f"{first} minus {second} in {measure.metric} on test set {measure.test_set}, {measure.selection} epoch, "
        f"is above {claim['margin']:g}",
        overall([word for word, _ in answers]),
        sentences or [f"No cell of {first} has a single counterpart in {second}."],
    )


def claim_page(answer: Answer | None) -> str:
    """The answer as Markdown."""
    if answer is None:
        return "# Claim\n\nNo claim was written down, so nothing is decided here.\n"
    head = f"# Claim\n\n> {answer.claim}\n\nTested as: {answer.test}. Decided by the paired 95 % interval.\n\n"
    return head + f"**{answer.word}**\n\n" + "".join(f"- {sentence}\n" for sentence in answer.sentences)


def claim_note(answer: Answer | None) -> list[str]:
    """The answer as a footnote of the table."""
    return [] if answer is None else [f"Claim: {answer.claim}: {answer.word}. {' '.join(answer.sentences)}"]


def overall(words: Sequence[str]) -> str:
    """One word for all pairs: each must replicate, and one that does not decides."""
    if "not replicated" in words:
        return "not replicated"
    if words and all(word == "replicated" for word in words):
        return "replicated"
    return "undecided at this n" if "undecided at this n" in words else "incomplete"


def answer_pair(a: Cell, b: Cell, margin: float, measure: Measure) -> tuple[str, str]:
    """The answer for two cells, and the numbers behind it."""
    found = difference(a, b, measure)
    if found is None:
        why = a.why or b.why or "; ".join({*a.reasons.values(), *b.reasons.values()})
        return "incomplete", f"No seed has both of the two ({why})." if why else "No seed has both of the two."
    if found.low is None or found.high is None:
        return "incomplete", f"Difference {found.value:+.4f}; one group of test images gives no interval."
    seeds = f"{found.n_seeds} of {max(len(a.runs), len(b.runs))} paired seeds"
    if found.n_seeds == 1:
        seeds += "; one seed: the interval holds for these two networks, not for the methods"
    numbers = f"Difference {found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}], {seeds}."
    return decide(found, margin, numbers)


def decide(found: Estimate, margin: float, numbers: str) -> tuple[str, str]:
    assert found.low is not None
    assert found.high is not None
    if found.low > margin:
        return "replicated", numbers
    if found.high < margin:
        return "not replicated", numbers
    half = (found.high - found.low) / 2
    return "undecided at this n", f"{numbers} The smallest difference that could have been seen is about {half:.4f}."
