import numpy as np
import pytest
import torch
from sklearn import metrics as oracle
from torchmetrics.functional.classification import binary_sensitivity_at_specificity, multiclass_calibration_error

from medmask.config.base import METRICS as NAMES
from medmask.evaluation.metrics import METRICS, Sample, confusion, value, why_undefined


def make_sample(n: int = 300, n_classes: int = 4, seed: int = 0, *, absent: tuple[int, ...] = (), ties: bool = False):
    rng = np.random.default_rng(seed)
    labels = rng.choice([k for k in range(n_classes) if k not in absent], size=n)
    logits = rng.normal(size=(n, n_classes))
    logits[np.arange(n), labels] += 1
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return Sample(labels, probs.round(1) if ties else probs)


ORACLES = {
    "accuracy": lambda s, w: oracle.accuracy_score(s.labels, s.predicted, sample_weight=w),
    "balanced_accuracy": lambda s, w: oracle.balanced_accuracy_score(s.labels, s.predicted, sample_weight=w),
    "precision_macro": lambda s, w: oracle.precision_score(
        s.labels, s.predicted, labels=s.present, average="macro", zero_division=0, sample_weight=w
    ),
    "recall_macro": lambda s, w: oracle.recall_score(
        s.labels, s.predicted, labels=s.present, average="macro", sample_weight=w
    ),
    "f1_macro": lambda s, w: oracle.f1_score(s.labels, s.predicted, labels=s.present, average="macro", sample_weight=w),
    "auroc_macro": lambda s, w: np.mean(
        [oracle.roc_auc_score(s.labels == k, s.probs[:, k], sample_weight=w) for k in s.present]
    ),
}


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("absent", [(), (2,)])
@pytest.mark.parametrize("ties", [False, True])
def test_scikit_learn_agrees(name, absent, ties):
    sample = make_sample(absent=absent, ties=ties)
    weights = np.random.default_rng(1).integers(0, 4, size=(3, len(sample.labels))).astype(float)
    assert value(name, sample) == pytest.approx(ORACLES[name](sample, None), abs=1e-12)
    expected = [ORACLES[name](sample, row) for row in weights]
    assert METRICS[name](sample, weights) == pytest.approx(expected, abs=1e-12)


def test_a_class_that_is_never_predicted_has_precision_zero():
    sample = Sample(np.array([0, 0, 1]), np.eye(2)[[0, 0, 0]])
    assert value("precision_macro", sample) == pytest.approx((2 / 3 + 0) / 2)


def test_ece_agrees_with_torchmetrics():
    sample = make_sample(n=800, seed=3)
    expected = multiclass_calibration_error(
        torch.from_numpy(sample.probs), torch.from_numpy(sample.labels), num_classes=4, n_bins=15, norm="l1"
    )
    assert value("ece", sample) == pytest.approx(float(expected), abs=1e-6)


def test_ece_by_hand():
    # bins of 0.9 (two images, one right) and of 0.6 (one image, right): (2 * |0.5 - 0.9| + |1 - 0.6|) / 3
    sample = Sample(np.array([0, 1, 0]), np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4]]))
    assert value("ece", sample) == pytest.approx((0.8 + 0.4) / 3)


@pytest.mark.parametrize("ties", [False, True])
def test_sensitivity_at_specificity_agrees_with_torchmetrics(ties):
    sample = make_sample(n=400, n_classes=2, seed=4, ties=ties)
    expected, _ = binary_sensitivity_at_specificity(
        torch.from_numpy(sample.probs[:, 1]), torch.from_numpy(sample.labels), min_specificity=0.9
    )
    assert value("sensitivity_at_90_specificity", sample) == pytest.approx(float(expected), abs=1e-6)


def test_sensitivity_by_hand():
    # ten negatives at 0.0 .. 0.9: one false alarm is allowed, so the threshold may fall to just above 0.8
    scores = np.array([*np.arange(10) / 10, 0.95, 0.85, 0.8, 0.1])
    sample = Sample(np.array([0] * 10 + [1] * 4), np.stack([1 - scores, scores], axis=1))
    assert value("sensitivity_at_90_specificity", sample) == pytest.approx(2 / 4)


def test_worst_group_by_hand():
    labels = np.array([0, 0, 0, 1, 1, 1])
    cue = np.array([0, 0, 1, 1, 1, 0], dtype=bool)
    predicted = np.array([0, 0, 0, 1, 0, 1])  # only the group (1, cue) has an error: 1 of 2 right
    assert value("worst_group_accuracy", Sample(labels, np.eye(2)[predicted], cue)) == 0.5


def test_a_draw_without_a_class_averages_over_the_others():
    sample = Sample(np.array([0, 0, 1, 2]), np.eye(3)[[0, 1, 1, 0]])
    weights = np.array([[1.0, 1, 1, 0], [2, 0, 0, 0]])
    assert METRICS["balanced_accuracy"](sample, weights) == pytest.approx([(0.5 + 1) / 2, 1])
    area = METRICS["auroc_macro"](sample, weights)
    assert area[0] == pytest.approx(0.75)
    assert np.isnan(area[1])  # one class alone has no AUROC


def test_confusion_has_true_classes_as_rows():
    sample = Sample(np.array([0, 0, 2]), np.eye(3)[[0, 1, 1]])
    assert confusion(sample).tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 0]]


def test_undefined_metrics_say_why():
    one_class = Sample(np.zeros(3, dtype=int), np.eye(3)[[0, 1, 2]])
    assert why_undefined("auroc_macro", one_class) == "needs two classes with images, got 1"
    assert "got 3 classes, 1 with images" in (why_undefined("sensitivity_at_90_specificity", one_class) or "")
    assert why_undefined("ece", one_class) == "needs more than 500 images, got 3"
    assert "cue" in (why_undefined("worst_group_accuracy", one_class) or "")
    assert why_undefined("accuracy", one_class) is None
    assert why_undefined("ece", make_sample(n=501)) is None
    assert why_undefined("ece", make_sample(n=500)) is not None


def test_every_configured_metric_is_there():
    assert set(METRICS) == set(NAMES)
