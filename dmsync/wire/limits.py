"""Every bound of dmsync/1 (protocol/limits.toml is the normative table; a test compares)."""

from typing import Final

VERSION_MIN: Final = 1
VERSION_MAX: Final = 1

MAGIC: Final = b"\x89DMS\r\n\x1a\n"
"""First bytes of a server. Not text, and broken by any newline translation or 7-bit path."""

BANNER_BYTES_MAX: Final = 64 * 1024
"""What a client discards before MAGIC: login banners, noisy shell start files."""

HELLO_BYTES_MAX: Final = 64 * 1024
"""The frames of a peer that has not said who it is."""

CONTROL_BYTES_MAX: Final = 1024 * 1024

RECORDS_BYTES_MAX: Final = 9 * 1024 * 1024
"""One record always fits: a page with 64 attributes of 64 KiB comes to 8 MiB and a header."""

RECORDS_BYTES_JOINED: Final = 512 * 1024
"""A sender joins records into one frame up to this: what is left over of a write takes an SSH
packet of its own, which costs as much as a full one."""

KNOWN_IDS_MAX: Final = 4096
PLAN_ENTRIES_MAX: Final = 65_536
PLAN_OBJECTS_MAX: Final = 16_777_216
"""All pages of a plan: each costs the receiver eight bytes until the transfer ends."""
REFS_PAGE_MAX: Final = 2048
REFS_MAX: Final = 100_000
REF_NAME_BYTES_MAX: Final = 255
UPDATES_MAX: Final = 2048
WANTS_MAX: Final = 4096
FRONTIER_MAX: Final = 16_384
CONTENT_MAX: Final = 4096
ABSENT_MAX: Final = 4096
SUBDOTS_MAX: Final = 128
SIGNATURES_PAGE_MAX: Final = 2048
SIGNATURE_BYTES_MAX: Final = 16 * 1024
SIGNATURES_BYTES_MAX: Final = 8 * 1024 * 1024
"""All signatures of one transfer: they come without credits."""
SIGNATURES_PER_OBJECT_MAX: Final = 16
DOTS_PAGE_MAX: Final = 2048
COLLABORATORS_MAX: Final = 1024
DOTS_MAX: Final = 100_000
CAPABILITIES_MAX: Final = 64
NAME_CHARS_MAX: Final = 128
TEXT_CHARS_MAX: Final = 16 * 1024
FACTS_CHARS_MAX: Final = 64 * 1024

EAGER_BYTES_MAX: Final = 1024 * 1024
"""A transfer of at most this many record bytes goes out without waiting for an inventory."""

INFLIGHT_BYTES_MAX: Final = 12 * 1024 * 1024
"""Record bytes a sender may have without a durable acknowledgement."""

PLAN_PAGES_INFLIGHT_MAX: Final = 8
REQUESTS_INFLIGHT_MAX: Final = 64
"""Requests that a client may send ahead of the answers."""
ACK_BYTES: Final = 4 * 1024 * 1024
ACK_INTERVAL_S: Final = 0.25

BUNDLE_HEADER_BYTES_MAX: Final = 16 * 1024 * 1024
BUNDLE_REFS_MAX: Final = 2048
"""As many as one page of refs: a bundle is for some branches, not for a whole server's."""

HANDSHAKE_TIMEOUT_S: Final = 30.0
IDLE_TIMEOUT_S: Final = 60.0
PING_INTERVAL_S: Final = 15.0

NO_PROGRESS_TIMEOUT_S: Final = 120.0
"""A peer that is waited for and sends heartbeats alone, or takes none of what is sent."""

PROGRESS_BYTES_MIN: Final = 4096
"""So much of one frame within NO_PROGRESS_TIMEOUT_S is progress, before the frame is complete."""

WORK_TIMEOUT_S: Final = 14_400.0
"""The same where the peer has work of its own to do: planning, or proving what came."""

WORK_BYTES_PER_S: Final = 10_000_000
"""How much of what came is proven in a second at least: so much more time there is for it."""

UNAUTHENTICATED_FREE: Final = 10
UNAUTHENTICATED_REFUSED_PERCENT: Final = 30
UNAUTHENTICATED_MAX: Final = 100
"""From FREE waiting connections on new ones are refused with a chance that grows from PERCENT to
certainty at MAX, as OpenSSH's MaxStartups does."""
UNAUTHENTICATED_PER_SOURCE_MAX: Final = 10
CONNECTIONS_MAX: Final = 1000
CONNECTIONS_PER_USER_MAX: Final = 600
"""Of those logged in: one user leaves room for others."""
SESSIONS_PER_CONNECTION_MAX: Final = 8
LOGIN_TIMEOUT_S: Final = 30.0
KEEPALIVE_INTERVAL_S: Final = 15
KEEPALIVES_MAX: Final = 4
"""A peer that answered none of so many is given up."""
