"""The progress bar of a job that loads its weights."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from mesh.client.blocking import Job


def wait(job: Job, timeout_s: float) -> None:
    """`Job.wait` with a bar on stderr: the state, then the bytes of weights in place, over all sites."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(job.last.state, total=None)
        for status in job.until_ready(timeout_s):
            progress.update(
                task, description=status.state, completed=status.loaded_bytes, total=status.total_bytes or None
            )
