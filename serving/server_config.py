"""Where and how to serve."""

from __future__ import annotations

from dataclasses import dataclass, field

from candidate_gen.live import LiveConfig
from serving.scorer import Scorer
from serving.security import ServerSecurity


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """Of `FeedServer`; the defaults are safe on any machine."""

    host: str = "127.0.0.1"
    port: int = 50051
    """0 lets the system choose."""
    security: ServerSecurity = field(default_factory=ServerSecurity)
    threads: int = 2
    """Requests computed at once; each uses one core. On two cores 4, 8 and 16 answer no more a second."""
    device: str = "cpu"
    """What --device says: on a GPU searches scan all vectors in its memory, and are exact; towers stay on the CPU."""
    scorer: Scorer = "plain"
    """How the ranker computes; anything but plain is compiled once for its shape, in 15 to 40 seconds of one core."""
    max_in_flight: int = 64
    """Pages and rankings beyond this many are refused at once with RESOURCE_EXHAUSTED, whatever their deadline."""
    max_changes_waiting: int = 16
    """Uploads and removals beyond this many are refused too, so that they leave calls in flight to the pages."""
    default_deadline_ms: float = 1_000.0
    """For clients that set none."""
    longest_deadline_ms: float = 10_000.0
    """Longer ones are cut to it."""
    shortlist_share: float = 1.0
    """Share of the explored pages whose shortlists are kept, so that replay can judge other feeds on this one's log:
    some 1.3 kB a page."""
    live: LiveConfig = field(default_factory=lambda: LiveConfig(flush=False))
    """When uploads are moved into an index of their own. The store is what survives a crash, so nothing is flushed."""
    poll_s: float = 1.0
    """How often LIVE, and the token file, are looked at."""
    web_port: int | None = None
    """The page for people, on `host` and protected as it is; 0 lets the system choose, None: no page."""
    metrics_port: int | None = None
    """Prometheus: `GET /metrics` here, on `metrics_host`; 0 lets the system choose, None: nowhere."""
    metrics_host: str = "127.0.0.1"
    otlp: str | None = None
    """OpenTelemetry: an OTLP/HTTP collector such as http://127.0.0.1:4318; None: no traces."""
    drain_notice_s: float = 1.0
    """Between saying NOT_SERVING and refusing new calls, so that balancers can react."""
    drain_grace_s: float = 10.0
    """What calls in flight get to end."""
