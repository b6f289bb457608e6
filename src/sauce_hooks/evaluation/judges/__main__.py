"""`python -m sauce_hooks.evaluation.judges`: how well judges agree with the labels, as a table."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from sauce_hooks.errors import SauceHooksError
from sauce_hooks.evaluation.judges import Agreement, Budget, Endpoint, Judge, Layered, Lexicon, agreement, labelled
from sauce_hooks.evaluation.probes import mentions

_HEADER = "| judge | labels | agreement (95%) | kappa | missed | invented | unsure | trusted |\n" + "|---" * 8 + "|"


class BareName:
    """What a judge must beat: the concept's name as a word, singular or plural."""

    name = "the bare name"

    def __call__(self, texts: Sequence[str], concept: str) -> list[bool]:
        """Whether the name stands in each text."""
        return [mentions(text, concept) for text in texts]


def row(found: Agreement, part: str) -> str:
    """A line of the table."""
    a = found.accuracy
    missed = sum(wrong.case.truth for wrong in found.disagreements)
    cells = (
        found.judge,
        f"{part} ({a.n})",
        f"{100 * a.value:.1f}% [{100 * a.low:.1f}, {100 * a.high:.1f}]",
        f"{found.kappa:.2f}",
        missed,
        len(found.disagreements) - missed,
        found.unsure,
        "yes" if found.trusted else "no",
    )
    return f"| {' | '.join(map(str, cells))} |"


def judges(args: argparse.Namespace) -> Iterator[Judge]:
    """The judges asked for; all of them together last."""
    yield BareName()
    every: list[Judge] = [Lexicon(args.entries)]
    if args.nli:
        from sauce_hooks.evaluation.judges import NLI

        every.append(NLI.load(args.nli))
    if args.endpoint:
        budget = Budget(max_requests=args.max_requests)
        every.append(Endpoint(args.model, args.endpoint, cache=args.cache, budget=budget))
    yield from every
    if len(every) > 1:
        yield Layered(every)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m sauce_hooks.evaluation.judges", description=__doc__)
    parser.add_argument("--entries", help="JSON file with more words for the lexicon")
    parser.add_argument("--nli", metavar="FOLDER", help="local folder with an NLI model")
    parser.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible endpoint, such as http://localhost:8000/v1")
    parser.add_argument("--model", help="what the endpoint calls its model")
    parser.add_argument("--cache", help="file to keep the endpoint's verdicts in")
    parser.add_argument(
        "--max-requests", type=int, default=1000, help="that the endpoint may be sent (default: %(default)s)"
    )
    parser.add_argument("--disagreements", action="store_true", help="show the cases of the development part that differ")
    args = parser.parse_args(argv)
    if args.endpoint and not args.model:
        parser.error("--endpoint needs --model")
    try:
        print(_HEADER)
        for judge in judges(args):
            for part in ("development", "held_out"):
                found = agreement(judge, labelled(part))
                print(row(found, part.replace("_", " ")), flush=True)
                if args.disagreements and part == "development":
                    for wrong in found.disagreements:
                        print(
                            f"    {wrong.case.concept}, labelled {wrong.case.truth}, judged {wrong.said}: {wrong.case.text}"
                        )
    except SauceHooksError as error:
        parser.exit(1, f"{error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
