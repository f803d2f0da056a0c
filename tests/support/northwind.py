"""A small trading company as an SQLite database, random edits of it, and all its rows as Python values."""

import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager

SCHEMA = """
CREATE TABLE categories (id INTEGER PRIMARY KEY, name TEXT NOT NULL,
  parent INTEGER REFERENCES categories(id));
CREATE TABLE customers (code TEXT PRIMARY KEY COLLATE NOCASE NOT NULL, company TEXT, note);
CREATE TABLE employees (id INTEGER PRIMARY KEY AUTOINCREMENT, email TEXT UNIQUE, photo BLOB,
  chief INTEGER REFERENCES employees(id) ON DELETE SET NULL);
CREATE TABLE products (id INTEGER PRIMARY KEY, name TEXT NOT NULL, price REAL,
  category INTEGER REFERENCES categories(id), cents INTEGER AS (CAST(price * 100 AS INTEGER)),
  label TEXT AS (name || '!') STORED);
CREATE TABLE orders (id INTEGER PRIMARY KEY, customer TEXT COLLATE NOCASE REFERENCES customers(code)
  ON DELETE CASCADE ON UPDATE CASCADE, employee INTEGER REFERENCES employees(id), day TEXT);
CREATE TABLE order_details (order_id INTEGER NOT NULL REFERENCES orders(id) ON DELETE CASCADE,
  product_id INTEGER NOT NULL REFERENCES products(id), quantity INTEGER CHECK (quantity > 0),
  PRIMARY KEY (order_id, product_id)) WITHOUT ROWID;
CREATE TABLE visits (page TEXT, seconds);
CREATE TABLE rates (currency TEXT PRIMARY KEY, rate REAL NOT NULL, remark ANY) STRICT;
CREATE TABLE audit (id INTEGER PRIMARY KEY, text TEXT);
CREATE UNIQUE INDEX products_by_name ON products(name) WHERE price IS NOT NULL;
CREATE INDEX products_by_cents ON products(cents);
CREATE INDEX orders_by_day ON orders(day, lower(customer));
CREATE VIEW sales AS SELECT product_id, sum(quantity) AS sold FROM order_details GROUP BY 1;
CREATE TRIGGER log_products AFTER UPDATE ON products BEGIN
  INSERT INTO audit(text) VALUES (old.name || new.name); END;
CREATE TRIGGER log_removed AFTER DELETE ON orders BEGIN
  INSERT INTO audit(text) VALUES ('order ' || old.id); DELETE FROM visits; END;
CREATE VIRTUAL TABLE pages USING fts5(title, body);
"""

KEYS = {
    "categories": ("id",),
    "customers": ("code",),
    "employees": ("id",),
    "products": ("id",),
    "orders": ("id",),
    "order_details": ("order_id", "product_id"),
    "visits": ("rowid",),
    "rates": ("currency",),
    "audit": ("id",),
}

VALUES = [
    None, 0, 1, 1.0, -0.0, 0.0, "1", b"1", b"", "", "a\0b", "ä€𝄞", 2**63 - 1, -(2**63), 2**53 + 1,
    float("inf"), float("-inf"), 1e-320, b"\xff\0", "A", "a", 0.1,
]  # fmt: skip


@contextmanager
def opened(path: str) -> Iterator[sqlite3.Connection]:
    """A connection whose work is committed and that is closed (contextmanager of sqlite3 is not)."""
    with closing(sqlite3.connect(path)) as connection, connection:
        yield connection


def create(path: str, rng: random.Random, size: int = 12) -> None:
    with opened(path) as db:
        db.executescript(SCHEMA)
        for i in range(1, size + 1):
            db.execute(
                "INSERT INTO categories VALUES (?,?,?)",
                (i, f"cat{i}", rng.choice([None, *range(1, i)])),
            )
            db.execute(
                "INSERT INTO customers VALUES (?,?,?)",
                (f"Cust{i}", f"company {i}", rng.choice(VALUES)),
            )
            db.execute(
                "INSERT INTO employees(email, photo, chief) VALUES (?,?,?)",
                (f"e{i}@x", rng.randbytes(20), rng.choice([None, *range(1, i)])),
            )
            db.execute(
                "INSERT INTO products(id,name,price,category) VALUES (?,?,?,?)",
                (i, f"prod{i}", i / 4, rng.randint(1, i)),
            )
            db.execute(
                "INSERT INTO orders VALUES (?,?,?,?)",
                (i, f"Cust{rng.randint(1, i)}", rng.randint(1, i), f"2026-01-{i:02}"),
            )
            db.execute("INSERT INTO order_details VALUES (?,?,?)", (i, rng.randint(1, i), i))
            db.execute("INSERT INTO visits VALUES (?,?)", (f"/p{i}", rng.choice(VALUES)))
            db.execute("INSERT INTO rates VALUES (?,?,?)", (f"C{i}", i * 1.5, rng.choice(VALUES)))
        db.execute("INSERT INTO pages VALUES ('home', 'welcome to the shop')")


def edit(path: str, rng: random.Random, count: int, *, span: int = 40, base: int = 0) -> None:
    """`count` random statements, each kept only if SQLite allows it (foreign keys on, triggers off)."""
    with opened(path) as db:
        for trigger, sql in db.execute(
            "SELECT name, sql FROM sqlite_schema WHERE type='trigger'"
        ).fetchall():
            db.execute(f"DROP TRIGGER {trigger}")
            db.execute("CREATE TEMP TABLE IF NOT EXISTS dropped(sql)")
            db.execute("INSERT INTO dropped VALUES (?)", (sql,))
        db.commit()
        db.execute("PRAGMA foreign_keys=1")
        for _ in range(count):
            sql, values = _statement(rng, span, base)
            try:
                db.execute(sql, values)
            except sqlite3.IntegrityError:
                pass
        for (sql,) in db.execute("SELECT sql FROM dropped").fetchall():
            db.execute(sql)


def _statement(rng: random.Random, span: int, base: int) -> tuple[str, tuple[object, ...]]:
    def n() -> int:
        return base + rng.randint(1, span)

    value = rng.choice(VALUES)
    some = rng.randbytes(3).hex()
    return rng.choice(
        [
            (
                "INSERT INTO categories VALUES (?,?,?)",
                (n(), f"cat {some}", rng.choice([None, n()])),
            ),
            ("UPDATE categories SET name=? WHERE id=?", (some, n())),
            ("DELETE FROM categories WHERE id=?", (n(),)),
            (
                "INSERT INTO customers VALUES (?,?,?)",
                (rng.choice(["CUST", "cust"]) + str(n()), some, value),
            ),
            ("UPDATE customers SET note=? WHERE code=?", (value, f"Cust{n()}")),
            ("UPDATE customers SET code=upper(code) WHERE code=?", (f"Cust{n()}",)),
            ("DELETE FROM customers WHERE code=?", (f"Cust{n()}",)),
            (
                "INSERT INTO employees(email,chief) VALUES (?,?)",
                (f"e{n()}@x", rng.choice([None, n()])),
            ),
            ("UPDATE employees SET email=? WHERE id=?", (f"e{n()}@x", n())),
            ("DELETE FROM employees WHERE id=?", (n(),)),
            (
                "INSERT INTO products(id,name,price,category) VALUES (?,?,?,?)",
                (n(), f"prod{n()}", rng.choice([None, 2.5]), rng.choice([None, n()])),
            ),
            ("UPDATE products SET price=? WHERE id=?", (rng.choice([None, n() / 8]), n())),
            ("DELETE FROM products WHERE id=?", (n(),)),
            (
                "INSERT INTO orders VALUES (?,?,?,?)",
                (n(), f"cust{n()}", rng.choice([None, n()]), some),
            ),
            ("UPDATE orders SET day=? WHERE id=?", (some, n())),
            ("DELETE FROM orders WHERE id=?", (n(),)),
            ("INSERT INTO order_details VALUES (?,?,?)", (n(), n(), n())),
            ("UPDATE order_details SET quantity=? WHERE order_id=?", (n(), n())),
            ("DELETE FROM order_details WHERE order_id=?", (n(),)),
            ("INSERT INTO visits VALUES (?,?)", (f"/{some}", value)),
            ("UPDATE visits SET seconds=? WHERE rowid=?", (value, n())),
            ("DELETE FROM visits WHERE rowid=?", (n(),)),
            ("INSERT OR REPLACE INTO rates VALUES (?,?,?)", (f"C{n()}", 0.5, value)),
            ("DELETE FROM rates WHERE currency=?", (f"C{n()}",)),
            ("INSERT OR IGNORE INTO audit VALUES (?,?)", (n(), some)),
        ]
    )


def typed(value: object) -> object:
    """A value that equals another only if both are stored alike (1, 1.0 and True are equal in Python)."""
    return (type(value).__name__, value.hex() if isinstance(value, float) else value)


def rows(path: str, table: str) -> dict[tuple[object, ...], tuple[object, ...]]:
    """All rows of a table by key; keys fold as NOCASE does, values carry their types."""
    keys = ", ".join(KEYS[table])
    with opened(path) as db:
        names = [row[1] for row in db.execute(f"PRAGMA table_xinfo({table})") if row[6] == 0]
        found = db.execute(f"SELECT {keys}, {', '.join(names)} FROM {table}").fetchall()
    at = len(KEYS[table])
    return {
        tuple(key.lower() if table == "customers" else key for key in row[:at]): tuple(
            map(typed, row[at:])
        )
        for row in found
    }


def everything(path: str) -> dict[str, dict[tuple[object, ...], tuple[object, ...]]]:
    return {table: rows(path, table) for table in KEYS}


def problems(path: str) -> list[object]:
    """What the two checks of SQLite object to: [] for a sound database."""
    with opened(path) as db:
        bad = [row for row in db.execute("PRAGMA integrity_check") if row != ("ok",)]
        return bad + db.execute("PRAGMA foreign_key_check").fetchall()
