"""Operators: the ``Ops`` protocol (``base``), its definition in numpy (``reference``) and the native twin (``cpu``)."""
