"""What the command line does, as functions that Python users call too.

A *plan* is everything that is decided before step 0 (settings, environment, dataset); making one
finds every mistake of the user. The loops are generators, so writing the ledger, metrics,
checkpoints, TensorBoard and the progress line all happen here.
"""

from safe_offrl.commands.assess import assess_runs
from safe_offrl.commands.benchmark import benchmark_run, benchmark_text
from safe_offrl.commands.certify import certify_run
from safe_offrl.commands.check_env import check_env_run
from safe_offrl.commands.collect import collect_config, collect_run
from safe_offrl.commands.common import parse_overrides, say_plain
from safe_offrl.commands.compare import compare_runs
from safe_offrl.commands.convert import convert_dataset
from safe_offrl.commands.demo import demo_run
from safe_offrl.commands.evaluate import evaluate_run
from safe_offrl.commands.export import export_run
from safe_offrl.commands.inspect import inspect_dataset
from safe_offrl.commands.ledger import show_ledger
from safe_offrl.commands.offline import pretrain_run, resume_pretrain
from safe_offrl.commands.offline_plan import PretrainPlan, plan_pretrain, pretrain_config
from safe_offrl.commands.online import finetune_run, resume_finetune
from safe_offrl.commands.online_plan import FinetunePlan, finetune_config, plan_finetune
from safe_offrl.commands.replay import replay_run
from safe_offrl.commands.trust import trust_run
from safe_offrl.commands.verify import verify_certificate

__all__ = [
    "FinetunePlan",
    "PretrainPlan",
    "assess_runs",
    "benchmark_run",
    "benchmark_text",
    "certify_run",
    "check_env_run",
    "collect_config",
    "collect_run",
    "compare_runs",
    "convert_dataset",
    "demo_run",
    "evaluate_run",
    "export_run",
    "finetune_config",
    "finetune_run",
    "inspect_dataset",
    "parse_overrides",
    "plan_finetune",
    "plan_pretrain",
    "pretrain_config",
    "pretrain_run",
    "replay_run",
    "resume_finetune",
    "resume_pretrain",
    "say_plain",
    "show_ledger",
    "trust_run",
    "verify_certificate",
]
