//! Answers against a model of the rules, over whatever may happen.

use proptest::prelude::*;
use serde_json::Value;

use super::*;

/// The rules, on decoded texts and without any care for speed.
#[derive(Default)]
struct Oracle {
    content: String,
    /// Id, what was sent of it, what is held.
    messages: Vec<(usize, String, Option<String>)>,
    tail: Option<usize>,
    is_open: bool,
    /// The whole answer: id, text, and what stands below it.
    parts: Vec<(Option<usize>, String, String)>,
}

impl Oracle {
    fn send(&mut self, owner: Option<usize>, text: &str) {
        if text.is_empty() {
            return;
        }
        let goes_on = owner.is_some() && self.tail == owner;
        if !self.content.is_empty() && !goes_on {
            self.content.push_str("\n\n");
        }
        self.content.push_str(text);
        self.tail = owner;
    }

    fn message(&mut self, id: usize, text: &str, list: &str) {
        let index = self.messages.len();
        self.parts.push((Some(id), text.to_owned(), list.to_owned()));
        self.messages.push((id, text.to_owned(), None));
        self.is_open = list.is_empty();
        if list.is_empty() {
            self.send(Some(index), text);
        } else {
            self.send(None, format!("{text}\n{list}").trim_start_matches('\n'));
        }
    }

    fn edit(&mut self, id: usize, text: &str) {
        let Some(index) = self.messages.iter().rposition(|message| message.0 == id) else {
            return self.message(id, text, "");
        };
        if let Some(part) = self.parts.iter_mut().rfind(|part| part.0 == Some(id)) {
            text.clone_into(&mut part.1);
        }
        let is_open = self.is_open && index + 1 == self.messages.len();
        let (_, sent, held) = &mut self.messages[index];
        match text.strip_prefix(sent.as_str()).map(str::to_owned) {
            Some(rest) if is_open => {
                (*sent, *held) = (text.to_owned(), None);
                self.send(Some(index), &rest);
            }
            _ => *held = Some(text.to_owned()),
        }
    }

    fn file(&mut self, link: String) {
        self.is_open = false;
        self.send(None, &link);
        self.parts.push((None, link, String::new()));
    }

    fn whole(&self) -> String {
        let texts = self.parts.iter().map(|(_, text, list)| match (text.is_empty(), list.is_empty()) {
            (false, false) => format!("{text}\n{list}"),
            _ => format!("{text}{list}"),
        });
        texts.filter(|text| !text.is_empty()).collect::<Vec<_>>().join("\n\n")
    }

    fn stop(&mut self) {
        for index in 0..self.messages.len() {
            let (_, sent, held) = &self.messages[index];
            let Some(held) = held else { continue };
            let common = sent.chars().zip(held.chars()).take_while(|(sent, held)| sent == held).count();
            let rest: String = held.chars().skip(common).collect();
            self.send(Some(index), &rest);
        }
    }
}

#[derive(Debug, Clone)]
enum Step {
    Message(usize, String),
    Buttons(usize, String),
    Edit(usize, String),
    /// An edit that appends to what the message last said.
    Grow(usize, String),
    File,
}

fn step() -> impl Strategy<Value = Step> {
    let text = || r#"([ab"\\\n/]|[éè😀😁\u{2028}\u{85}]|\PC){0,4}"#;
    prop_oneof![
        2 => (0..4_usize, text()).prop_map(|(id, text)| Step::Message(id, text)),
        1 => (0..4_usize, "[ab]{0,2}").prop_map(|(id, text)| Step::Buttons(id, text)),
        3 => (0..4_usize, text()).prop_map(|(id, text)| Step::Edit(id, text)),
        5 => (0..4_usize, text()).prop_map(|(id, text)| Step::Grow(id, text)),
        1 => Just(Step::File),
    ]
}

fn content_of(records: &[String]) -> String {
    records.iter().filter_map(|record| record.strip_prefix('+')).collect()
}

proptest! {
    #[test]
    fn growing_edits_add_up_to_the_final_text(pieces in proptest::collection::vec("(?s).{0,12}", 1..12)) {
        let mut text = pieces[0].clone();
        let mut frames = vec![message(1, &text)];
        for piece in &pieces[1..] {
            text.push_str(piece);
            frames.push(edit(1, &text));
        }
        prop_assert_eq!(content_of(&run(&frames, true)), &text[..]);
        let tokens = text.chars().count().div_ceil(4);
        frames.push(stop());
        let records = run(&frames, true);
        prop_assert_eq!(&records[records.len() - 3..], ["stop".to_owned(), format!("usage 3+{tokens}={}", 3 + tokens), "done".to_owned()]);
        prop_assert_eq!(whole_content(&frames), text);
    }

    #[test]
    fn whatever_happens_is_what_the_rules_say(steps in proptest::collection::vec((step(), any::<bool>()), 0..24)) {
        let (mut oracle, mut answer, mut frames) = (Oracle::default(), Completion::new(head(true)), Vec::new());
        let (mut content, mut latest) = (String::new(), std::collections::HashMap::<usize, String>::new());
        for (step, is_relayed) in steps {
            let frame = match step {
                Step::Message(id, text) => {
                    oracle.message(id, &text, "");
                    let frame = message(id, &text);
                    latest.insert(id, text);
                    frame
                }
                Step::Buttons(id, text) => {
                    oracle.message(id, &text, "- x");
                    let frame = buttons(id, &text, &labels(&["x"]));
                    latest.insert(id, text);
                    frame
                }
                Step::Edit(id, text) => {
                    oracle.edit(id, &text);
                    let frame = edit(id, &text);
                    latest.insert(id, text);
                    frame
                }
                Step::Grow(id, text) => {
                    let latest = latest.entry(id).or_default();
                    latest.push_str(&text);
                    oracle.edit(id, latest);
                    edit(id, latest)
                }
                Step::File => {
                    oracle.file(format!("[f](https://chat.example/files/{}/f)", id(9)));
                    file(9, "f")
                }
            };
            let frame = if is_relayed { relayed(&frame) } else { frame };
            let mut out = Vec::new();
            answer.handle(&frame, &mut out);
            content.push_str(&content_of(&records(out, true)));
            prop_assert_eq!(&content, &oracle.content);
            frames.push(frame);
        }
        oracle.stop();
        let mut out = Vec::new();
        answer.handle(&stop(), &mut out);
        let last = records(out, true);
        content.push_str(&content_of(&last));
        prop_assert_eq!(&content, &oracle.content);
        let tokens = content.chars().count().div_ceil(4);
        prop_assert_eq!(&last[last.len() - 2], &format!("usage 3+{tokens}={}", 3 + tokens));
        prop_assert_eq!(whole_content(&frames), oracle.whole());
    }

    #[test]
    fn no_bytes_of_another_node_do_harm(
        kind in 0..Kind::ALL.len(),
        changes in proptest::collection::vec((any::<usize>(), 0x20..0x7f_u8), 0..4),
        cut in any::<usize>(),
        text in r#"(["\\\n]|\PC){0,8}"#,
    ) {
        let kind = Kind::ALL[kind];
        let source = match kind {
            Kind::File => file(1, &text),
            Kind::Edit => edit(1, &text),
            _ => buttons(1, &text, &labels(&["x"])),
        };
        let mut json = source.json().to_vec();
        for (at, byte) in changes {
            let at = at % json.len();
            json[at] = byte;
        }
        json.truncate(cut % (2 * json.len()));
        let json = String::from_utf8_lossy(&json);
        let frames = [message(1, "a"), odd(kind, 1, &json), edit(1, "b"), stop()];
        // Reading the records checks each of them.
        prop_assert!(run(&frames, false).len() >= 2);
        let body = whole(&frames).to_json(&head(false));
        prop_assert!(serde_json::from_slice::<Value>(&body).is_ok());
    }
}
