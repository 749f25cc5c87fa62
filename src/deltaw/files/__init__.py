"""A live adapter ↔ its folder: store, pack, unpack, compress, convert, merge and verify on disk."""
