//! Texts with `{i}`, `{u}`, `{channel}`, `{text}` and `{len}` in them: taken apart once, written often.

/// A piece of a template.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Literal(Vec<u8>),
    /// The client's index.
    Index,
    /// The client's user.
    User,
    /// Where the message goes.
    Channel,
    /// The message.
    Text,
    /// Bytes of the body, or of the message where there is no body.
    Length,
}

/// What stands for the names in braces.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Values<'a> {
    pub(super) index: usize,
    pub(super) user: usize,
    pub(super) channel: &'a str,
    pub(super) text: &'a [u8],
    pub(super) length: usize,
}

/// A text with names in braces. Braces around anything else stay as they are: JSON is full of them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Template(Vec<Piece>);

impl Template {
    /// Takes `text` apart.
    #[must_use]
    pub fn new(text: &str) -> Self {
        let names = [
            ("{i}", Piece::Index),
            ("{u}", Piece::User),
            ("{channel}", Piece::Channel),
            ("{text}", Piece::Text),
            ("{len}", Piece::Length),
        ];
        let (mut pieces, mut literal, mut rest) = (Vec::new(), Vec::new(), text);
        while let Some(at) = rest.find('{') {
            literal.extend_from_slice(&rest.as_bytes()[..at]);
            rest = &rest[at..];
            if let Some((name, piece)) = names.iter().find(|(name, _)| rest.starts_with(name)) {
                if !literal.is_empty() {
                    pieces.push(Piece::Literal(std::mem::take(&mut literal)));
                }
                pieces.push(piece.clone());
                rest = &rest[name.len()..];
            } else {
                literal.push(b'{');
                rest = &rest[1..];
            }
        }
        literal.extend_from_slice(rest.as_bytes());
        if !literal.is_empty() {
            pieces.push(Piece::Literal(literal));
        }
        Self(pieces)
    }

    /// Appends the text with everything in its place.
    pub(super) fn write(&self, out: &mut Vec<u8>, values: &Values<'_>) {
        use std::io::Write;
        for piece in &self.0 {
            // Writing to a vector does not fail.
            let _ = match piece {
                Piece::Literal(literal) => out.write_all(literal),
                Piece::Index => write!(out, "{}", values.index),
                Piece::User => write!(out, "{}", values.user),
                Piece::Channel => out.write_all(values.channel.as_bytes()),
                Piece::Text => out.write_all(values.text),
                Piece::Length => write!(out, "{}", values.length),
            };
        }
    }

    /// True if the message is in it.
    #[must_use]
    pub fn has_text(&self) -> bool {
        self.0.contains(&Piece::Text)
    }
}

/// `text` with `\r`, `\n`, `\t` and `\\` as the characters they stand for; a backslash before anything else goes, so
/// that `\"` is a quote.
pub(super) fn unescape(text: &str) -> String {
    let (mut out, mut characters) = (String::with_capacity(text.len()), text.chars());
    while let Some(character) = characters.next() {
        out.push(match character {
            '\\' => match characters.next() {
                Some('r') => '\r',
                Some('n') => '\n',
                Some('t') => '\t',
                Some(other) => other,
                None => '\\',
            },
            other => other,
        });
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_replaced_and_other_braces_stay() {
        let values = Values { index: 7, user: 3, channel: "room:all", text: b"hi", length: 41 };
        for (template, expected) in [
            ("", ""),
            ("/ws?user=u{u}&i={i}", "/ws?user=u3&i=7"),
            ("{len}{text}{text}", "41hihi"),
            (r#"{"channel_id":"{channel}","text":"{text}"}"#, r#"{"channel_id":"room:all","text":"hi"}"#),
            ("{{i}} {nothing} {", "{7} {nothing} {"),
        ] {
            let mut out = Vec::new();
            Template::new(template).write(&mut out, &values);
            assert_eq!(String::from_utf8(out).unwrap(), expected, "{template}");
        }
        assert!(Template::new("a{text}").has_text() && !Template::new("a{i}").has_text());
    }

    #[test]
    fn escapes_are_what_they_stand_for() {
        assert_eq!(unescape(r#"PUB x {len}\r\n\"\\\t\"#), "PUB x {len}\r\n\"\\\t\\");
    }
}
