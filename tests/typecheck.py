"""The run-time checker of the package's annotations: beartype, an int being a float as everywhere else in Python."""

from beartype import BeartypeConf, beartype

checker = beartype(conf=BeartypeConf(is_pep484_tower=True))
