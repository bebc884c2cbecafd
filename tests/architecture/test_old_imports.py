"""Other people's code imports what the first version had, by the names it had then."""

from __future__ import annotations

import json
import subprocess
import sys

FIRST = (
    "distillation_loss Objective LiveRows CachedRows Head uniforms DIVERGENCES VERIFIERS SELECTORS TokenPair "
    "dense_pair topk_pair BetaSchedule TaidSchedule DistillTrainer load_recipe"
)
"""``selectkd.__all__`` of the first version."""

NAMES = {
    "divergences": "DIVERGENCES LABEL_LOSSES Divergence adaptive_kl alpha_beta cross_entropy decoupled_kl forward_kl "
    "generalized_jsd is_unpaired jeffreys kl_tv_hybrid neg_log_acceptance reads_label reverse_kl sampled_reverse_kl "
    "skew_kl skew_reverse_kl taid todi total_variation",
    "divergences.gradient": "Block Column centre project total",
    "divergences.power": "alpha_beta",
    "divergences.sorted": "uld",
    "divergences.top_k": "MERGED",
    "verifiers": "STATISTICS VERIFIERS RowStatistics Verifier always expected_spec_k greedy_topk hellinger label_top_k "
    "matched_random matched_shuffle prefix_gate reads_proposal_alone spec_k spec_k_literal student_entropy "
    "teacher_entropy",
    "verifiers.statistics": "RowStatistics",
    "selectors": "SELECTORS Selector adakd adaspec atkd rho_1 se_kd teachability tip",
    "testing": "example_log_dists check_divergence seeded check_verifier",
    "pair": "TokenPair dense_pair topk_pair support_pair checked_ids logsumexp",
    "schedules": "BetaSchedule TaidSchedule",
    "registry": "Spec did_you_mean parameters lookup bind build name_of",
}
"""The public names of each module that has moved."""

CODE = f"""
import importlib, json, sys, warnings
found = {{}}
for module, names in json.loads(sys.argv[1]).items():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        moved = importlib.import_module("selectkd." + module)
        importlib.import_module("selectkd." + module)
    told = [str(one.message) for one in caught if issubclass(one.category, DeprecationWarning)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        missing = [name for name in names.split() if not hasattr(moved, name)]
    found[module] = [told, missing, moved.__name__]
import selectkd
missing = [name for name in {FIRST!r}.split() if not hasattr(selectkd, name)]
print(json.dumps([found, missing]))
"""


def test_every_public_name_of_the_first_version_imports_with_one_warning_for_each_module_that_moved() -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE, json.dumps(NAMES)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    found, missing = json.loads(ran.stdout)
    assert missing == []
    for module, (warned, absent, home) in found.items():
        assert absent == [], module
        assert warned == [f"selectkd.{module} is now {home}; import it from there"]
        assert home.startswith("selectkd.objective."), module
