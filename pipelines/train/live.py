"""A training's board in a terminal, drawn anew each second; in a log, now and then."""

import shutil
import sys
import textwrap
import time

from pipelines.train.board import Board, look
from pipelines.train.job import TrainJob

DRAW_EVERY_S = 1.0
LINES_EVERY_S = 10.0
_HEAD = [
    "rank",
    "host",
    "pid",
    "epoch",
    "step",
    "phase",
    "ms/step",
    "rows/s",
    "waits",
    "memory MB",
    "sent MB",
    "received MB",
    "behind",
    "beat s",
]
_STATES = {
    "running": "running",
    "ended": "is not running; the last training ended well",
    "failed": "is not running; the last training failed",
}


def watch(job: TrainJob, *, as_json: bool = False) -> Board:
    """Show the job until it ends, in a terminal always in the same place. Returns its last board."""
    in_place, height, shown, last = sys.stdout.isatty() and not as_json, 0, 0.0, None
    while True:
        board = look(job)
        troubles = (board.state, [(alert.rank, alert.kind) for alert in board.alerts])
        if in_place:
            text = as_text(board, width=shutil.get_terminal_size().columns)
            up = f"\x1b[{height}F\x1b[J" if height else ""
            print(up + text, flush=True)
            height = len(text.splitlines())
        elif as_json or troubles != last or time.monotonic() - shown >= LINES_EVERY_S:
            print(board.model_dump_json() if as_json else as_text(board), flush=True)
            shown, last = time.monotonic(), troubles
        if board.state != "running":
            return board
        time.sleep(DRAW_EVERY_S)


def as_text(board: Board, *, width: int | None = None) -> str:
    """The board as lines that a user reads, the ranks in trouble beneath; cut, or folded, to the width."""
    where = f"epoch {board.epoch + 1}/{board.epochs}, step {board.step:,}/{board.steps:,}"
    loss = "" if board.loss is None else f", loss {board.loss:.4f}"
    lines = [f"{board.workload}  {_STATES[board.state]}  {where}{loss}  run {board.run_id or 'none'}"]
    lines += _table(board) if board.ranks else ["no rank has started yet"]
    told = [alert.text for alert in board.alerts]
    told += [f"failed: {board.why}"] if board.why else []
    told += [f"last epoch: {board.verdict}"] if board.verdict and not board.why else []
    if width is None:
        return "\n".join(lines + told)
    return "\n".join([line[: width - 1] for line in lines] + [part for text in told for part in _folded(text, width)])


def _folded(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(20, width - 1), subsequent_indent="  ")


def _table(board: Board) -> list[str]:
    rows = [_HEAD]
    for row in board.ranks:
        rows.append(
            [
                str(row.rank),
                row.host,
                str(row.pid),
                str(row.epoch + 1),
                f"{row.step:,}",
                row.phase,
                f"{row.step_ms:,.1f}" if row.step_ms else "-",
                f"{row.rows_per_s:,.0f}" if row.step_ms else "-",
                f"{row.waiting_share:.0%}",
                f"{row.memory_mb:,.0f}",
                f"{row.sent_mb:,.1f}",
                f"{row.received_mb:,.1f}",
                f"{row.behind_steps:,}",
                f"{row.beat_age_s:.1f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text_columns = (1, 5)
    return [
        "  ".join(
            cell.ljust(size) if place in text_columns else cell.rjust(size)
            for place, (cell, size) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
