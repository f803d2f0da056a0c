"""A link by hand: `python -m tools.netlab 2222 --delay-ms 50 --rate 20M`; it prints its port."""

import argparse
import signal

from tools.netlab.link import Link

_FACTORS = {"k": 1e3, "M": 1e6, "G": 1e9}


def main() -> None:
    """Relay until SIGINT or SIGTERM, then say what passed."""
    parser = argparse.ArgumentParser(prog="netlab", description="A slow link to a local TCP port.")
    parser.add_argument("target_port", type=int)
    parser.add_argument("--delay-ms", type=float, default=0.0, help="one way")
    parser.add_argument("--rate", type=_rate, default=None, help="bits a second: 500k, 20M, 1G")
    parser.add_argument("--cut-after-bytes", type=int, default=None)
    parser.add_argument("--cut-after-s", type=float, default=None)
    given = parser.parse_args()
    with Link(
        given.target_port,
        delay_ms=given.delay_ms,
        rate_bits_per_s=given.rate,
        cut_after_bytes=given.cut_after_bytes,
        cut_after_s=given.cut_after_s,
    ) as link:
        print(f"127.0.0.1:{link.port}", flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
        print(f"up {link.bytes_up} bytes, down {link.bytes_down}, {link.connections} connections")


def _rate(text: str) -> float:
    return float(text.rstrip("kMG")) * _FACTORS.get(text[-1:], 1.0)


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    main()
