"""Headers of video codecs: what the packets of a stream say of their frames, without decoding any.

`codecs.CODECS` is the table of codecs, and `parser.Parser` what each of them implements. A new codec is one file with a
`Parser`, and one row of the table.
"""
