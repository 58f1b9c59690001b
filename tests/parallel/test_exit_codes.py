"""Exit codes in the batch script and in the documentation are those of `parallel.exit_codes`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from parallel.exit_codes import COLLECTIVE, NOT_RETRIED, ExitCode

ROOT = Path(__file__).parents[2]
SCRIPT = (ROOT / "launch" / "train.sbatch").read_text()
OF_OUR_PROCESSES = {*ExitCode} - {ExitCode.INTERRUPTED}  # which the table has as 128 + N


def _branches(script: str) -> dict[str, str]:
    """Pattern -> first commands of each branch of `case $status`."""
    body = re.search(r"^  case \$status in\n(.*?)^  esac", script, re.DOTALL | re.MULTILINE)
    assert body, "the batch script has no `case $status`"
    return dict(re.findall(r'^    ([\d |]+|"\$saved")\)\s*(.+?)$', body[1], re.MULTILINE))


def test_the_batch_script_retries_what_may_help_alone() -> None:
    branches = _branches(SCRIPT)
    ended = {int(code) for pattern, commands in branches.items() if "break" in commands for code in pattern.split("|")}
    assert ended == NOT_RETRIED
    assert branches["0"].endswith("finish 0 ;;")
    assert '"$saved"' in branches


def test_the_batch_script_knows_a_run_that_saved() -> None:
    assert re.findall(r"^saved=(\d+)", SCRIPT, re.MULTILINE) == [str(int(ExitCode.SAVED))]


def test_links_of_a_chain_end_where_the_next_would_end_like_the_last() -> None:
    """A loss that diverges, and input that was wrong from the start."""
    (codes,) = re.findall(r"if \[\[ \$1 == (\d+) \|\| \(\$1 == (\d+) && ", SCRIPT)
    assert {int(code) for code in codes} == {ExitCode.DIVERGED, ExitCode.WRONG_INPUT}


def test_the_documentation_lists_every_code() -> None:
    page = (ROOT / "docs" / "slurm.md").read_text()
    table = page[page.index("| exit code of a rank |") :].partition("\n\n")[0]
    rows = {int(code): remedy for code, remedy in re.findall(r"^\| (\d+) \| .* \| (.*) \|$", table, re.MULTILINE)}
    assert set(rows) == OF_OUR_PROCESSES
    never = {code for code, remedy in rows.items() if "do not retry" in remedy or "without the reported" in remedy}
    assert never == NOT_RETRIED


def test_no_code_is_written_as_a_number() -> None:
    """Outside `parallel/exit_codes.py`: exit statuses come from `ExitCode`."""
    written = []
    for package in ("parallel", "moe_train", "launch", "tools"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("sys.exit", "os._exit", "SystemExit"):
                    written += [f"{path}:{node.lineno}" for word in node.args if isinstance(word, ast.Constant)]
                elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "exit_code":
                    written += [f"{path}:{node.lineno}"] if isinstance(node.value, ast.Constant) else []
    assert not written


def test_what_all_ranks_end_with_together_is_told_to_the_batch_script() -> None:
    assert {ExitCode.BAD_NODE, ExitCode.SAVED} == COLLECTIVE
    assert not NOT_RETRIED & {ExitCode.DONE, ExitCode.FAILED, ExitCode.HUNG, ExitCode.SAVED}
