"""A look at a data set as a Report."""

from __future__ import annotations

from deltaw.runs.memory.machine import describe, foot, placeless
from deltaw.runs.reports.page import Chart, Report, Sample, Series, Table
from deltaw.runs.survey.look import Survey


def survey_report(look: Survey) -> Report:
    """Return the page about a data set."""
    lengths, tokens = look.lengths, look.tokens
    middles = [(low + high - 1) / 2 for low, high in zip(lengths.edges, lengths.edges[1:], strict=False)]
    facts = [("Records", f"{look.records:,}", look.what), ("Form", look.form, look.fields)]
    if tokens is not None:
        share = tokens.supervised / max(1, tokens.tokens)
        facts += [
            ("Tokens", f"{tokens.tokens:,}", f"{tokens.longest:,} in the longest record kept"),
            ("Taught", f"{tokens.supervised:,}", f"{share:.0%} of the tokens"),
            (
                "Cut or dropped",
                f"{tokens.truncated + tokens.dropped:,}",
                f"{tokens.truncated:,} cut, {tokens.dropped:,} dropped",
            ),
        ]
    facts.append(("Copies", f"{look.copies:,}", "records equal to an earlier one"))
    classes = [[name, f"{count:,}"] for name, count in look.labels.items()]
    counts = list(zip(middles, lengths.counts, strict=True))
    return Report(
        title=placeless(look.source),
        headline=f"{look.what}; held out: {look.held_out or 'nothing so far'}.",
        facts=facts,
        curves=[Chart(f"Length in {lengths.unit}", lengths.unit, "records", [Series("records", counts, "bars")])],
        examples=[
            Sample(
                "".join(text for text, taught in one.parts if not taught),
                "".join(text for text, taught in one.parts if taught),
                None,
                None,
            )
            for one in look.rendered
        ],
        tables=[Table("Classes", ["class", "records"], classes)] if classes else [],
        warnings=[*filter(None, [look.overlap, look.note]), *look.notes, *look.odd],
        footer=foot(describe()),
    )
