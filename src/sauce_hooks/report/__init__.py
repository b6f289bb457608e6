"""Room 7: pictures and pages. Results go in, a self-contained HTML page comes out."""

from sauce_hooks.report.concept import render_concept, write_concept
from sauce_hooks.report.concept_data import Evidence, look
from sauce_hooks.report.content import (
    Activating,
    Card,
    ChangeMap,
    ConceptFeatures,
    DemoPage,
    FeatureCard,
    YesNo,
)
from sauce_hooks.report.features import render_features, write_features
from sauce_hooks.report.figures import Figure, MetricRow, metric_rows
from sauce_hooks.report.page import render_page, write_page
from sauce_hooks.report.pictures import mark_patch, overlay_change, png_data_uri
from sauce_hooks.report.words import Piece, compare_words, tidy

__all__ = [
    "Activating",
    "Card",
    "ChangeMap",
    "ConceptFeatures",
    "DemoPage",
    "Evidence",
    "FeatureCard",
    "Figure",
    "MetricRow",
    "Piece",
    "YesNo",
    "compare_words",
    "look",
    "mark_patch",
    "metric_rows",
    "overlay_change",
    "png_data_uri",
    "render_concept",
    "render_features",
    "render_page",
    "tidy",
    "write_concept",
    "write_features",
    "write_page",
]
