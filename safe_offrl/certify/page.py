"""A certificate in words: one sentence, and a page."""

from __future__ import annotations

import html
from typing import Any

from safe_offrl.certify.certificate import CERTIFICATE, RECORD, Claim, Finding, bounds_in_words
from safe_offrl.limits import QUANTITIES


def seen(claim: Claim, total: float, episodes: int) -> str:
    """What so many episodes showed, in words."""
    if claim.quantity == "accident":
        return f"{round(total)} of {episodes:,} episodes with an accident"
    return f"cost {total * claim.scale / episodes:.3g} per episode over {episodes:,} episodes"


def quantity(claim: Claim) -> str:
    """The claim, in words."""
    return f"{QUANTITIES[claim.quantity].claimed} < {claim.limit:g}"


def summary(certificate: dict[str, Any]) -> str:
    """One sentence for people; of two one-sided bounds it states the one that the verdict needs."""
    claim, found = Claim(**certificate["claim"]), _finding(certificate)
    what = seen(claim, certificate["total_outcome"], certificate["episodes"])
    if claim.method == "anytime":
        stated = f"lies in {bounds_in_words(claim, found)}"
    elif found.verdict == "refuted":
        stated = f"is at least {found.lower:.4g}"
    else:
        stated = f"is at most {found.upper:.4g}"
    alike = certificate.get("distinct_episodes", certificate["episodes"])
    if alike < certificate["episodes"]:
        what += f", {alike:,} of them different"
    return (
        f"{certificate['verdict']}: {quantity(claim)} at confidence {claim.confidence:g} "
        f"({what}; it {stated})"
    )


def _finding(certificate: dict[str, Any]) -> Finding:
    return Finding(*(certificate[key] for key in Finding._fields))


def _independence(certificate: dict[str, Any]) -> str:
    """How many episodes differ, and what is known of the environment's seeds."""
    situations = certificate["situations"]
    text = f"{certificate['distinct_episodes']:,} different episodes"
    if situations is None:
        return f"{text}; no seeds were tried"
    return (
        f"{text}; {situations['seeds']} seeds play {situations['different']} different ones, given "
        "the same actions"
    )


def page(certificate: dict[str, Any]) -> str:
    """A certificate as a self-contained HTML page, for light and dark screens."""
    # Rows of the table.
    claim = Claim(**certificate["claim"])
    policy, shield, env = (certificate[key] for key in ("policy", "shield", "environment"))
    packages = certificate["versions"]["packages"]
    made_with = ", ".join(f"{name} {packages[name]}" for name in ("safe-offrl", "torch"))
    guard = f"chooses among {shield['draws']} draws" if shield["acts"] else "abstains"
    rows = {
        "Claim": f"{quantity(claim)}, confidence {claim.confidence:g}",
        "Seen": f"{seen(claim, certificate['total_outcome'], certificate['episodes'])}, "
        f"{certificate['steps']:,} steps",
        "Bounds": bounds_in_words(claim, _finding(certificate)),
        "Independence": _independence(certificate),
        "Method": certificate["method"],
        "Attempt": f"{claim.attempt}, at {claim.attempt_confidence:.2%} by itself",
        "Policy": f"version {policy['version']} of the run {policy['run']}, "
        f"sha256 {policy['sha256']}",
        "Shield": f"{guard}, {certificate['shield_interventions']:,} interventions, "
        f"sha256 {shield['sha256']}",
        "Environment": f'{env["id"]}, {env["horizon"]:,} steps, accident = "{env["accident"]}"',
        "Seeds": f'stream "{claim.stream}" of seed {claim.seed}',
        "Record": f"{RECORD}, sha256 {certificate['record_sha256']}",
        "Made": f"{certificate['created']} with {made_with}",
    }
    # Table and list.
    table = "\n".join(
        f'<tr><th scope="row">{html.escape(key)}</th><td>{html.escape(value)}</td></tr>'
        for key, value in rows.items()
    )
    left_out = "\n".join(f"<li>{html.escape(text)}</li>" for text in certificate["does_not_cover"])
    # Page.
    return f"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(certificate["verdict"])}: {html.escape(quantity(claim))}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto;
  padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: left; vertical-align: top; padding: .4rem .6rem .4rem 0;
  border-bottom: 1px solid color-mix(in srgb, currentColor 20%, transparent);
  overflow-wrap: anywhere; }}
th {{ width: 8rem; overflow-wrap: normal; }}
</style>
<h1>{html.escape(certificate["verdict"].capitalize())}: {html.escape(quantity(claim))}</h1>
<table>
{table}
</table>
<h2>What it does not cover</h2>
<ul>
{left_out}
</ul>
<p>Check it: <code>safe-offrl verify {CERTIFICATE}</code></p>
</html>
"""
