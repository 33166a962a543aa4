"""What the tests of several probes need."""

import pytest

from occjax import metrics


@pytest.fixture
def one_in_two(monkeypatch):
    """Lets half of clean maps ring: the few of a small run set no threshold of 5 %."""
    at_fpr = metrics.threshold_at_fpr
    monkeypatch.setattr(metrics, 'threshold_at_fpr', lambda scores, fpr: at_fpr(scores, 0.5))
