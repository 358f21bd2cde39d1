"""A certificate in words: one sentence, and a page."""

from __future__ import annotations

import html
from typing import Any

from safe_offrl.certify.certificate import CERTIFICATE, RECORD, Claim, Finding, bounds_in_words
from safe_offrl.limits import quantity_named


def seen(claim: Claim, total: float, episodes: int) -> str:
    """What so many episodes showed, in words."""
    if claim.quantity == "accident":
        return f"{round(total)} of {episodes:,} episodes with an accident"
    cost = quantity_named(claim.quantity).event
    return f"{cost} {total * claim.scale / episodes:.3g} per episode over {episodes:,} episodes"


def quantity(claim: Claim) -> str:
    """The claim, in words."""
    return f"{quantity_named(claim.quantity).claimed} < {claim.limit:g}"


def summary(certificate: dict[str, Any]) -> str:
    """One sentence for people; of two one-sided bounds it states the one that the verdict needs."""
    episodes, parts = certificate["episodes"], parts_of(certificate)
    alike = certificate.get("distinct_episodes", episodes)
    details = []
    for claim, total, found in parts:
        what = seen(claim, total, episodes)
        if alike < episodes:
            what += f", {alike:,} of them different"
        if claim.method == "anytime":
            stated = f"lies in {bounds_in_words(claim, found)}"
        elif found.verdict == "refuted":
            stated = f"is at least {found.lower:.4g}"
        else:
            stated = f"is at most {found.upper:.4g}"
        details.append(f"{what}; it {stated}")
    asked = " and ".join(quantity(claim) for claim, _, _ in parts)
    confidence = parts[0][0].confidence
    return f"{certificate['verdict']}: {asked} at confidence {confidence:g} ({'; '.join(details)})"


def parts_of(certificate: dict[str, Any]) -> list[tuple[Claim, float, Finding]]:
    """Of each claim of a certificate: it, the sum of the outcomes, and what was found."""
    return [
        (
            Claim(**part["claim"]),
            part["total_outcome"],
            Finding(*(part[key] for key in Finding._fields)),
        )
        for part in (certificate, *certificate.get("further", []))
    ]


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
    parts = parts_of(certificate)
    claim, episodes = parts[0][0], certificate["episodes"]
    asked = " and ".join(quantity(one) for one, _, _ in parts)
    policy, shield, env = (certificate[key] for key in ("policy", "shield", "environment"))
    packages = certificate["versions"]["packages"]
    made_with = ", ".join(f"{name} {packages[name]}" for name in ("safe-offrl", "torch"))
    chooses = f"chooses among {shield['draws']} draws" if shield["acts"] else "abstains"
    rows = {
        "Claim": f"{asked}, confidence {claim.confidence:g}",
        "Seen": f"{'; '.join(seen(one, total, episodes) for one, total, _ in parts)}, "
        f"{certificate['steps']:,} steps",
        "Bounds": "; ".join(bounds_in_words(one, found) for one, _, found in parts),
        "Independence": _independence(certificate),
        "Method": certificate["method"],
        "Attempt": f"{claim.attempt}, at {claim.attempt_confidence:.2%} by itself",
        "Policy": f"version {policy['version']} of the run {policy['run']}, "
        f"sha256 {policy['sha256']}",
        "Shield": f"{chooses}, {certificate['shield_interventions']:,} interventions, "
        f"sha256 {shield['sha256']}",
        **_guard_row(certificate),
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
<title>{html.escape(certificate["verdict"])}: {html.escape(asked)}</title>
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
<h1>{html.escape(certificate["verdict"].capitalize())}: {html.escape(asked)}</h1>
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


def _guard_row(certificate: dict[str, Any]) -> dict[str, str]:
    """What the guard did; nothing of one that there was none of."""
    guard = certificate.get("guard", {})
    if not guard.get("acts"):
        return {}
    kept = ", ".join(f"{name} {limit:g}" for name, limit in guard["limits"].items())
    steps = f"its fallback acted in {certificate['guarded_steps']:,} steps"
    return {"Guard": f"keeps {kept}; {steps}, sha256 {guard['sha256']}"}
