"""Audits: measurements that any distilled model can be put through."""
