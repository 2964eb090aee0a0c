"""How the machine is doing, in numbers that are cheap to read (well under a millisecond): CPU, memory, disk and network."""

import shutil
from pathlib import Path

import psutil

_GB = 1e9
_MB = 1e6


class SystemMonitor:
    """Reads the machine between two calls of `metrics`; rank 0's machine only."""

    def __init__(self, run_folder: Path):
        self._run_folder = run_folder
        self._process = psutil.Process()
        psutil.cpu_percent(interval=None)  # the first call only starts the measurement
        self._network_at_start = psutil.net_io_counters()

    def metrics(self) -> dict[str, float]:
        """CPU percent (mean over cores, since the last call), memory and free disk in GB (1e9 bytes), network MB since the start."""
        metrics = {
            "system/cpu_percent": psutil.cpu_percent(interval=None),
            "system/process_memory_gb": self._process.memory_info().rss / _GB,
            "system/machine_memory_gb": psutil.virtual_memory().used / _GB,
            "system/disk_free_gb": shutil.disk_usage(self._run_folder).free / _GB,
        }
        network = psutil.net_io_counters()
        if network is not None and self._network_at_start is not None:  # None on a machine without network devices
            metrics["system/network_sent_mb"] = (network.bytes_sent - self._network_at_start.bytes_sent) / _MB
            metrics["system/network_received_mb"] = (network.bytes_recv - self._network_at_start.bytes_recv) / _MB
        return metrics
