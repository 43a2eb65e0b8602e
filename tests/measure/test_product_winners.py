"""The choices of one process are those of the next."""

import dataclasses

from hotloop.kernels.router import ProductUse
from hotloop.measure import Winner, winners
from hotloop.measure.product_winners import recall, remember, versions


def test_choices_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    use = ProductUse(
        batch=2, m=3, k=4, n=5, layout="nt", adds=True, num_threads=2, kernel="onednn", calls=9,
        seconds=1.0, kernel_s={"torch": 2e-5, "onednn": 1e-5},
    )  # fmt: skip
    out = dataclasses.replace(use, adds=False, into_out=True, kernel="torch")
    unknown = ProductUse(batch=0, m=1, k=1, n=1, layout="nn", adds=False, num_threads=1,
                         kernel=None)  # fmt: skip
    others = [
        Winner(question="kernel/product/64", answer="torch", versions=versions()),
        Winner(question="run/1/2", answer="torch", versions=versions()),
        Winner(question="run/a/b/c/d/nn/2", answer=[], versions=versions()),
        Winner(question="run/0/1/1/1/nn/2", answer="another", versions=versions()),
        Winner(question="run/0/1/1/1/nn?/2", answer="torch", versions=versions()),
    ]
    winners.add(others, "f")
    remember([use, out, unknown], [], "f")
    again = recall("f")
    assert again == [dataclasses.replace(u, calls=0, seconds=0.0) for u in (use, out)]
    assert winners.recall("kernel/product/64", versions(), "f").answer == "torch"
    assert recall("another machine") == []
    monkeypatch.setattr("hotloop.kernels.build_hash", lambda: "of other kernels")
    monkeypatch.setattr("hotloop.kernels.is_available", lambda: True)
    assert recall("f") == []


def test_what_is_known_is_not_written_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    use = ProductUse(batch=0, m=3, k=4, n=5, layout="nn", adds=False, num_threads=2,
                     kernel="hotloop", kernel_s={"torch": 2e-5, "hotloop": 1e-5})  # fmt: skip
    remember([use], [use], "f")
    assert recall("f") == []
