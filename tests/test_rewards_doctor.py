import functools
from dataclasses import replace

import numpy as np
import pytest
from doctor_cases import STAGES, VISIBLE_ONLY

from rewards.contract import RewardError, resolve
from rewards.doctor import CHECKS, ENTRIES, MIX, Limits, diagnose, examine, mix_of, noise
from rewards.guards import Background
from rewards.terms import Term
from rewards.trajectory import Trajectory

LIMITS = Limits(margin=0.15, least=0.03, noise=0.5, slow_ms=500, redundant=0.95, opposed=-0.5)
HONEST = Term("honest", Trajectory())
examined = functools.cache(lambda term: examine(term, STAGES))


def verdicts(*terms, limits=LIMITS, accept=None):
    """By (subject, check)."""
    found = {term.name: examined(term) for term in terms}
    return {(v.subject, v.check): v for v in diagnose(terms, found, limits, accept or {})}


def failed(*terms, **options):
    """Checks that fail, of the terms alone."""
    return {check for (subject, check), v in verdicts(*terms, **options).items()
            if v.status == "fail" and subject != MIX}  # fmt: skip


def brightness(batch):
    return batch.video.mean((1, 2, 3, 4)) / 255


def test_an_honest_tracking_reward_has_no_fault_of_its_own():
    found = verdicts(HONEST)
    assert {check: found["honest", check].status for check in CHECKS} == dict.fromkeys(CHECKS, "pass")


def test_alone_it_is_told_what_it_does_not_see():
    found = verdicts(HONEST)
    fails = {check for (subject, check), v in found.items() if subject == MIX and v.status == "fail"}
    assert {"duplicated", "panning", "blur"} <= fails and not {"static", "vanishing", "reversed"} & fails
    assert "duplicated" in found["honest", "hacks"].text.partition("like the truth")[2]


def test_tracking_only_what_is_visible_is_found_to_reward_vanishing_objects(tmp_path):
    (tmp_path / "mine.py").write_text(VISIBLE_ONLY)
    mine = Term("mine", resolve(f"{tmp_path / 'mine.py'}:judge"))
    verdict = verdicts(mine)[MIX, "vanishing"]
    assert verdict.status == "fail" and "the objects are gone from the middle on" in verdict.text
    assert (MIX, "vanishing") not in verdicts(HONEST)


def test_a_reward_that_draws_random_numbers_is_not_repeatable():
    rng = np.random.default_rng(0)
    assert "repeatable" in failed(Term("dice", lambda batch: 0.5 + 0.01 * rng.random(len(batch))))


def test_a_score_relative_to_the_batch_depends_on_the_batch():
    def relative(batch):
        light = brightness(batch)
        return 0.5 + light - light.mean()

    assert "batch" in failed(Term("relative", relative))
    assert not {"batch", "repeatable"} & failed(Term("light", brightness))


def test_a_score_that_carries_state_from_call_to_call_is_not_repeatable():
    class Counting:
        calls = 0

        def __call__(self, batch):
            self.calls += 1
            return np.full(len(batch), 1 / self.calls)

    assert "repeatable" in failed(Term("counting", Counting()))


def test_scores_outside_the_declared_range_are_named():
    def tenfold(batch):
        return 10 * brightness(batch)

    assert "range" in failed(Term("tenfold", tenfold))
    wide = verdicts(Term("tenfold", tenfold, range=(0.0, 10.0)))
    assert wide["tenfold", "range"].status == "pass" and wide["tenfold", "range"].text.endswith("of 0..10")

    def spiky(batch):  # in range on the mean, not in every frame, which a training would refuse
        return np.tile([0.0, 0.0, 1.5], (len(batch), 5))[:, : batch.scored.shape[1]]

    assert "range" in failed(Term("spiky", spiky))
    assert "range" in failed(Term("endless", lambda batch: np.full(len(batch), np.inf)))


@pytest.mark.parametrize(
    ("fn", "said"),
    [
        (lambda batch: 1 / 0, "ZeroDivisionError"),
        (lambda batch: [0.5], "one score per clip"),
        (lambda batch: batch.video.sort(), "read-only"),
        (lambda batch: [None] * len(batch), "no clip got a score"),
    ],
)
def test_a_reward_that_does_not_run_gets_one_verdict_that_says_why(fn, said):
    found = verdicts(Term("broken", fn))
    assert set(found) == {("broken", "runs")} or set(found) >= {("broken", "runs"), (MIX, "monotone")}
    assert found["broken", "runs"].status == "fail" and said in found["broken", "runs"].text


def test_clips_without_a_score_are_counted():
    def picky(batch):
        return [None if b % 4 == 0 else 0.5 for b in range(len(batch))]

    verdict = verdicts(Term("picky", picky))["picky", "runs"]
    assert verdict.status == "warn" and "26% of the clips got no score" in verdict.text


def test_a_term_without_any_score_is_left_out_of_the_mix_and_proves_nothing():
    silent = Term("silent", lambda batch: [0.5 if b else None for b in range(len(batch))])
    found = {"honest": examined(HONEST), "silent": examined(silent)}
    nothing = replace(found["silent"], scores=np.full_like(found["silent"].scores, np.nan))
    mix = mix_of([HONEST, silent], found | {"silent": nothing})
    np.testing.assert_allclose(mix.scores, found["honest"].scores, atol=1e-6)
    told = {v.check: v.status for v in diagnose([silent], {"silent": nothing}, LIMITS, {}) if v.subject == "silent"}
    assert told["monotone"] == "fail"


def test_a_reward_that_pays_for_the_error_is_not_monotone():
    honest = Trajectory()
    assert "monotone" in failed(Term("backwards", lambda batch: 1 - honest(batch).score))
    assert "monotone" not in failed(Term("background", Background()))


def test_a_reward_that_is_a_checksum_is_all_noise_and_so_is_a_constant_one():
    def checksum(batch):
        return batch.video.astype(np.int64).sum((1, 2, 3, 4)) % 97 / 97

    assert "noise" in failed(Term("checksum", checksum))
    assert "noise" in failed(Term("constant", lambda batch: np.full(len(batch), 0.5)))


def test_a_floor_below_the_noise_is_named_with_a_better_one():
    wobbling = verdicts(Term("light", lambda b: 20 * brightness(b) % 1, floor=1e-4))["light", "noise"]
    assert "set floor" in wobbling.text


def test_noise_is_the_share_of_the_variance_between_equally_good_clips():
    group = np.float32([[[0.0, 0.2], [0.6, 0.8]]])
    share, sd = noise(group)
    assert share == pytest.approx(0.02 / np.var([0, 0.2, 0.6, 0.8], ddof=1), rel=1e-5)
    assert sd == pytest.approx(np.sqrt(0.02), rel=1e-5)
    assert noise(np.zeros((2, 3, 4))) == (1.0, 0.0)


def test_a_slow_reward_is_named():
    assert verdicts(Term("light", brightness), limits=Limits(0.15, 0.03, 0.5, 0.0, 0.95, -0.5))[
        "light", "speed"
    ].status == "warn"  # fmt: skip


def test_a_copy_of_a_term_and_its_opposite_are_named():
    light = Term("light", brightness)
    for twin in (brightness, lambda batch: 1 - brightness(batch)):
        assert verdicts(light, Term("twin", twin))["twin", "overlap"].status == "warn"
    assert verdicts(light, HONEST)["honest", "overlap"].status == "pass"


def test_a_canary_sees_the_true_video_and_is_no_part_of_the_mix():
    seen = {}

    def spy(name):
        def judge(batch):
            seen[name] = batch.truth is not None
            return brightness(batch)

        return judge

    canary = Term("watch", spy("watch"), weight=0, role="canary")
    found = verdicts(canary, Term("light", spy("light")))
    assert seen == {"watch": True, "light": False}
    assert {subject for subject, _ in found} == {"watch", "light", MIX}
    assert {subject for subject, _ in verdicts(canary)} == {"watch"}


def test_the_mix_weighs_the_terms_by_their_ranges():
    one, two = Term("one", brightness, weight=3), Term("two", lambda b: -2 * brightness(b), weight=-1, range=(-2, 0))
    found = {term.name: examine(term, STAGES) for term in (one, two)}
    light = found["one"].scores
    np.testing.assert_allclose(found["two"].scores[light > 0], 1 - light[light > 0], atol=1e-5)
    np.testing.assert_allclose(mix_of([one, two], found).scores, (3 * light - found["two"].scores) / 4, atol=1e-6)


def test_a_frame_that_was_not_finite_earns_the_worst_score_whatever_the_reward_says():
    scores = examine(Term("flattering", lambda batch: np.ones(len(batch))), STAGES).scores
    worst = ENTRIES.index("NaN frame")
    assert (scores[:, worst] == 0).all() and (np.delete(scores, worst, 1) == 1).all()


def test_an_accepted_failure_needs_a_reason_and_a_hack_must_still_lie_below_the_truth():
    both = (HONEST, Term("background", Background(), weight=0.3))
    found = verdicts(*both, accept={MIX: {"duplicated": "small weight", "blur": "no term sees it"}})
    assert found[MIX, "duplicated"].status == "accepted" and "small weight" in found[MIX, "duplicated"].text
    assert found[MIX, "blur"].status == "fail"
    accept = {"constant": {"noise": "a test"}}
    constant = Term("constant", lambda batch: np.full(len(batch), 0.5))
    assert verdicts(constant, accept=accept)["constant", "noise"].status == "accepted"


@pytest.mark.parametrize("accept", [{"hones": {"noise": "a reason"}}, {"honest": {"noize": "a reason"}}])
def test_accepting_what_does_not_exist_is_an_error(accept):
    with pytest.raises(RewardError, match=r"accept\.hones.*: a subject is one of mix, honest; a check is one of"):
        verdicts(HONEST, accept=accept)


def test_one_stage_is_too_few():
    with pytest.raises(RewardError, match="at least 2 stages, not 1"):
        examine(HONEST, STAGES[:1])
