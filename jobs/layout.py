"""Rewrite any Delta table in the layout that streams; seed, file size, codec and lake.shared are those of the workload.

spark-submit --properties-file conf/spark.conf jobs/layout.py conf/digits.yaml SOURCE TARGET --fill x=0
"""

import sys
from pathlib import Path

from pipelines.cli import guarded, parser
from pipelines.config import Config
from pipelines.errors import ConfigError
from pipelines.features.layout import rewrite
from pipelines.features.sample import take_sample
from pipelines.features.shuffle import shuffle_quality
from pipelines.session import get_session


def write(config: Config) -> None:
    """Write, and say what."""
    snapshot = rewrite(
        get_session(config),
        arguments.source,
        Path(arguments.target),
        version=arguments.version,
        columns=arguments.columns.split(",") if arguments.columns else (),
        key=arguments.key.split(",") if arguments.key else (),
        fill=dict(map(_pair, arguments.fill)),
        pad={name: int(value) for name, value in map(_pair, arguments.pad)},
        shard_mb=arguments.file_mb or config.features.layout.shard_mb,
        compression=config.features.layout.compression,
        seed=config.seed,
    )
    print(f"{snapshot.table} version {snapshot.version}: {snapshot.rows:,} rows in {len(snapshot.files)} files")
    quality = shuffle_quality(take_sample(snapshot))
    print(f"{'' if quality.is_shuffled else 'warning: not well shuffled: '}{quality}")


def _pair(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise ConfigError(f"--fill, --pad: wanted COLUMN=NUMBER, seen {text!r}") from None


if __name__ == "__main__":
    jobs = parser(__doc__)
    jobs.add_argument("source", help="a Delta table")
    jobs.add_argument("target", help="folder of the new table")
    jobs.add_argument("--version", type=int, help="of the source (default: the latest)")
    jobs.add_argument("--columns", help="those to keep, separated by commas (default: all)")
    jobs.add_argument("--key", help="columns whose hash is row_id (default: all)")
    jobs.add_argument("--fill", action="append", default=[], metavar="COLUMN=VALUE", help="in place of nulls")
    jobs.add_argument("--pad", action="append", default=[], metavar="COLUMN=LENGTH", help="fill lists up with zeros")
    jobs.add_argument("--file-mb", type=float, help="size of a file (default: features.layout.shard_mb)")
    arguments = jobs.parse_args()
    sys.exit(guarded(arguments, write))
