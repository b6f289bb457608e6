"""Room 6: probes, judges, metrics, baselines. A model and an eraser go in, a table comes out."""

from sauce_hooks.evaluation.answers import Answer, ask, prepare
from sauce_hooks.evaluation.describe import describe_sae
from sauce_hooks.evaluation.distill import Distilled, Gap, distill
from sauce_hooks.evaluation.eligibility import Eligibility
from sauce_hooks.evaluation.judges import NLI, Agreement, Budget, Endpoint, Layered, Lexicon, agreement
from sauce_hooks.evaluation.labelled import Labelled, LabelledImages
from sauce_hooks.evaluation.loss_added import Answered, AnsweredBatch, loss_added, own_answers, prepare_answers
from sauce_hooks.evaluation.measure import chat_prompt, default_wording, measure_images, measure_probes, tune_concept
from sauce_hooks.evaluation.metrics import METRICS, Rate
from sauce_hooks.evaluation.probes import PROTOCOL_VERSION, Judge, Picture, Probe, ProbeSet, Question, Wording, mentions
from sauce_hooks.evaluation.results import ORIGINAL, Results
from sauce_hooks.evaluation.run import Method, evaluate
from sauce_hooks.evaluation.statistics import Comparison, Counts
from sauce_hooks.evaluation.wordings import CHINESE, HELD_OUT, PHRASINGS, wording

__all__ = [
    "CHINESE",
    "HELD_OUT",
    "METRICS",
    "NLI",
    "ORIGINAL",
    "PHRASINGS",
    "PROTOCOL_VERSION",
    "Agreement",
    "Answer",
    "Answered",
    "AnsweredBatch",
    "Budget",
    "Comparison",
    "Counts",
    "Distilled",
    "Eligibility",
    "Endpoint",
    "Gap",
    "Judge",
    "Labelled",
    "LabelledImages",
    "Layered",
    "Lexicon",
    "Method",
    "Picture",
    "Probe",
    "ProbeSet",
    "Question",
    "Rate",
    "Results",
    "Wording",
    "agreement",
    "ask",
    "chat_prompt",
    "default_wording",
    "describe_sae",
    "distill",
    "evaluate",
    "loss_added",
    "measure_images",
    "measure_probes",
    "mentions",
    "own_answers",
    "prepare",
    "prepare_answers",
    "tune_concept",
    "wording",
]
