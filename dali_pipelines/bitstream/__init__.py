"""Parses the headers of video codecs: what the packets of a stream say about their frames, without decoding any.

`codecs.CODECS` is the table of codecs; each implements `parser.Parser`. A new codec is one file with a `Parser`, and
one row of the table.
"""
