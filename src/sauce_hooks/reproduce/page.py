"""All findings on one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sauce_hooks import __version__
from sauce_hooks.report.rendering import render, write_html
from sauce_hooks.reproduce.finding import Finding

_TEMPLATE = "reproduction.html.j2"


def write_findings(findings: Sequence[Finding], path: Path, study: str) -> Path:
    """Every claim with its outcome first, then table by table; returns where the page lies."""
    outcomes = Counter(claim.outcome for finding in findings for claim in finding.claims)
    pictures = {finding.name: _picture(finding) for finding in findings}
    html = render(_TEMPLATE, findings=findings, outcomes=dict(outcomes), pictures=pictures, study=study, version=__version__)
    return write_html(html, path)


def _picture(finding: Finding) -> str:
    """A PNG as a data URI."""
    buffer = io.BytesIO()
    finding.draw().savefig(buffer, format="png", dpi=150)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
