"""Damaged videos end in chunks or in a sentence, soon, and leave nothing behind."""

import fuzz


def test_damaged_videos_end_in_chunks_or_in_a_sentence(tmp_path):
    outcomes = fuzz.run(100, seed=0, keep=tmp_path / "failures")
    assert not any(outcome.failure for outcome in outcomes.values()), fuzz.summary(outcomes)
    assert sum(outcome.chunks > 0 for outcome in outcomes.values()) > 30, fuzz.summary(outcomes)
