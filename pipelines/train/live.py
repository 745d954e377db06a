"""A training's board in a terminal, drawn anew each second; in a log, now and then."""

import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Sequence

from pipelines.train.board import Board, RankRow, look
from pipelines.train.job import TrainJob

DRAW_EVERY_S = 1.0
LINES_EVERY_S = 10.0
_COLUMNS: dict[str, Callable[[RankRow], str]] = {
    "rank": lambda row: str(row.rank),
    "host": lambda row: row.host,
    "pid": lambda row: str(row.pid),
    "epoch": lambda row: str(row.epoch + 1),
    "step": lambda row: f"{row.step:,}",
    "phase": lambda row: row.phase,
    "ms/step": lambda row: f"{row.step_ms:,.1f}" if row.step_ms else "-",
    "rows/s": lambda row: f"{row.rows_per_s:,.0f}" if row.step_ms else "-",
    "waits": lambda row: f"{row.waiting_share:.0%}",
    "behind": lambda row: f"{row.behind_steps:,}",
    "stale": lambda row: "" if row.staleness is None else f"{row.staleness:.1f}",
    "beat s": lambda row: f"{row.beat_age_s:.1f}",
    "RSS MB": lambda row: f"{row.memory_mb:,.0f}",
    "sent MB": lambda row: f"{row.sent_mb:,.1f}",
    "recv MB": lambda row: f"{row.received_mb:,.1f}",
}
_TEXTS = ("host", "phase")  # begin at the left
_STATES = {
    "running": "running",
    "ended": "is not running; the last training ended well",
    "failed": "is not running; the last training failed",
}


def watch(job: TrainJob, *, as_json: bool = False) -> Board:
    """Show the job until it ends, in a terminal always in the same place. Returns its last board."""
    if sys.stdout.isatty() and not as_json:
        return _redraw(job)
    due, last = 0.0, None
    while True:
        board = look(job)
        trouble = (board.state, [(alert.rank, alert.kind) for alert in board.alerts])
        if as_json or trouble != last or time.monotonic() >= due:
            print(board.model_dump_json() if as_json else as_text(board), flush=True)
            due, last = time.monotonic() + LINES_EVERY_S, trouble
        if board.state != "running":
            return board
        time.sleep(DRAW_EVERY_S)


def _redraw(job: TrainJob) -> Board:
    above = ""
    while True:
        board = look(job)
        text = as_text(board, width=shutil.get_terminal_size().columns)
        print(above + text, flush=True)
        above = f"\x1b[{len(text.splitlines())}F\x1b[J"  # to the table's first line, and clear what is below
        if board.state != "running":
            return board
        time.sleep(DRAW_EVERY_S)


def as_text(board: Board, *, width: int | None = None) -> str:
    """The board as lines that a user reads, the ranks in trouble beneath; cut, or folded, to the width."""
    where = f"epoch {board.epoch + 1}/{board.epochs}, step {board.step:,}/{board.steps:,}"
    loss = "" if board.loss is None else f", loss {board.loss:.4f}"
    lines = [f"{board.workload}  {_STATES[board.state]}  {where}{loss}  run {board.run_id or 'none'}"]
    lines += _table(board.ranks) if board.ranks else ["no rank has started yet"]
    told = [alert.text for alert in board.alerts]
    told += [f"failed: {board.why}"] if board.why else []
    told += [f"last epoch: {board.verdict}"] if board.verdict and not board.why else []
    if width is not None:
        lines = [line[: width - 1] for line in lines]
        told = [part for text in told for part in textwrap.wrap(text, max(20, width - 1), subsequent_indent="  ")]
    return "\n".join(lines + told)


def _table(rows: Sequence[RankRow]) -> list[str]:
    columns = []
    for name, cell in _COLUMNS.items():
        texts = [name, *map(cell, rows)]
        if not any(texts[1:]):  # no rank has such
            continue
        width = max(map(len, texts))
        columns.append([text.ljust(width) if name in _TEXTS else text.rjust(width) for text in texts])
    return ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]
