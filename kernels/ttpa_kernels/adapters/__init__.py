"""The operations behind the interfaces of other libraries."""
