//! Buttons as workers describe them: a plain list, or a component view.
//!
//! A *list* is an array of buttons; a missing label or `custom_id` becomes the empty string. A *view* is an object
//! with `children` (or `components`), or an array of such objects (rows); what stands in a view without a label
//! (menus, separators) is skipped. A `style` is one of our names or a Discord-style number: 1 primary, 2 secondary,
//! 3 success, 4 danger, 5 link, 6 premium. An `emoji` is a string, or an object with a `name`. `null` means absent. A field that is
//! there twice is refused.

use std::borrow::Cow;
use std::cell::Cell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::platform::adapter::SendError;
use crate::proto::event::{BUTTONS_MAX, Button, ButtonStyle, CUSTOM_ID_CHARS_MAX, LABEL_CHARS_MAX};

/// The most values that a description in text may have among the fields that count: buttons, rows, labels and so on.
/// 25 buttons with every field, each in a row of its own, have 225.
const VALUES_MAX: usize = 1024;
/// The most levels of arrays and objects within each other in a description in text. A button in a row in a list is
/// at the fourth.
const DEPTH_MAX: usize = 16;
/// The fields that count. `name` is an emoji's.
const FIELDS: [&str; 9] = ["label", "custom_id", "emoji", "style", "url", "disabled", "children", "components", "name"];

/// Why a description of buttons was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ViewError {
    /// Neither an array nor an object with `children` or `components`.
    #[error("buttons are a list, or a view: an object with `children` or `components`")]
    NotAView,
    /// An element of a list or of a row that is no object.
    #[error("button {index} is not an object")]
    NotAnObject {
        /// Which button, from 0.
        index: usize,
    },
    /// `children` or `components` that is no array.
    #[error("`{field}` must be an array")]
    NotAnArray {
        /// Which of the two.
        field: &'static str,
    },
    /// A field of the wrong type.
    #[error("`{field}` of button {index} must be {expected}")]
    BadField {
        /// Which button, from 0.
        index: usize,
        /// The field.
        field: &'static str,
        /// What it must be.
        expected: &'static str,
    },
    /// A style that is none of ours.
    #[error(
        "the style of button {index} is not one of primary, secondary, success, danger, link, premium or a number from 1 to 6"
    )]
    UnknownStyle {
        /// Which button, from 0.
        index: usize,
    },
    /// A limit was passed.
    #[error(transparent)]
    Limit(#[from] SendError),
    /// A text that describes far more than a message may have.
    #[error("the buttons have more than {VALUES_MAX} values, or more than {DEPTH_MAX} levels")]
    TooMuch,
    /// A text that is no JSON.
    #[error("the buttons are not JSON: {reason}")]
    NotJson {
        /// What is wrong with it.
        reason: String,
    },
}

/// Reads a list of buttons or a component view, and checks the limits.
///
/// ```
/// use tabcast::platform::view::parse_view;
/// let rows = serde_json::json!([{"children": [{"label": "Yes", "custom_id": "y", "style": 3}, {"type": "select"}]}]);
/// let buttons = parse_view(&rows)?;
/// assert_eq!((buttons.len(), buttons[0].label.as_str()), (1, "Yes"));
/// # Ok::<(), tabcast::platform::view::ViewError>(())
/// ```
///
/// # Errors
/// The shape is none of the two, a field has the wrong type, or a limit of [`check_buttons`] is passed.
pub fn parse_view(view: &Value) -> Result<Vec<Button>, ViewError> {
    let mut buttons = Vec::new();
    match view {
        Value::Array(items) => {
            for item in items {
                let object = as_object(item, buttons.len())?;
                match row(object)? {
                    Some(children) => collect(children, &mut buttons)?,
                    None => buttons.push(button(object, buttons.len())?),
                }
            }
        }
        Value::Object(object) => collect(row(object)?.ok_or(ViewError::NotAView)?, &mut buttons)?,
        _ => return Err(ViewError::NotAView),
    }
    check_buttons(&buttons)?;
    Ok(buttons)
}

/// Reads the same from its JSON text. It takes memory for the fields that count only, and stops where a text has more
/// of them than any message's buttons: a hostile text of any length costs at most a few hundred KiB and its own
/// strings.
///
/// # Errors
/// As [`parse_view`]; [`ViewError::TooMuch`] past 1,024 values or 16 levels, [`ViewError::NotJson`].
pub fn read_view(json: &str) -> Result<Vec<Button>, ViewError> {
    let left = Cell::new(Some(VALUES_MAX));
    let mut deserializer = serde_json::Deserializer::from_str(json);
    let part = Part { left: &left, depth: 0 };
    let view = part.deserialize(&mut deserializer).and_then(|view| deserializer.end().map(|()| view));
    match view {
        Ok(view) => parse_view(&view),
        Err(_) if left.get().is_none() => Err(ViewError::TooMuch),
        Err(error) => Err(ViewError::NotJson { reason: error.to_string() }),
    }
}

/// A description in any form that has objects and lists, read within the bounds of [`read_view`]. Past them it is the
/// form's own error, in the words of [`ViewError::TooMuch`].
#[cfg(all(feature = "gateway", feature = "redis"))]
#[derive(Debug)]
pub(crate) struct View(pub(crate) Result<Vec<Button>, ViewError>);

#[cfg(all(feature = "gateway", feature = "redis"))]
impl<'de> serde::Deserialize<'de> for View {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let left = Cell::new(Some(VALUES_MAX));
        match (Part { left: &left, depth: 0 }).deserialize(deserializer) {
            Ok(view) => Ok(Self(parse_view(&view))),
            Err(_) if left.get().is_none() => Err(D::Error::custom(ViewError::TooMuch)),
            Err(error) => Err(error),
        }
    }
}

/// One value of a description, with what of it counts.
#[derive(Clone, Copy)]
struct Part<'l> {
    /// How many more values there may be; none once there were too many, or too many levels.
    left: &'l Cell<Option<usize>>,
    depth: usize,
}

impl Part<'_> {
    fn take<E: Error>(self) -> Result<(), E> {
        self.left.set(self.left.get().and_then(|left| left.checked_sub(1)));
        self.left.get().map(|_| ()).ok_or_else(|| E::custom("too many values"))
    }

    fn within<E: Error>(self) -> Result<Self, E> {
        if self.depth == DEPTH_MAX {
            self.left.set(None);
            return Err(E::custom("too many levels"));
        }
        Ok(Self { depth: self.depth + 1, ..self })
    }
}

impl<'de> DeserializeSeed<'de> for Part<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.take()?;
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Part<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, number: i64) -> Result<Value, E> {
        Ok(number.into())
    }

    fn visit_u64<E>(self, number: u64) -> Result<Value, E> {
        Ok(number.into())
    }

    fn visit_f64<E>(self, number: f64) -> Result<Value, E> {
        Ok(number.into())
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(text.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let part = self.within()?;
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(part)? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let part = self.within()?;
        let mut object = Map::new();
        while let Some(key) = entries.next_key::<Cow<'de, str>>()? {
            if FIELDS.contains(&&*key) {
                let value = entries.next_value_seed(part)?;
                if object.insert(key.into_owned(), value).is_some() {
                    return Err(A::Error::custom("a field is there twice"));
                }
            } else {
                entries.next_value::<IgnoredAny>()?;
            }
        }
        Ok(Value::Object(object))
    }
}

/// The limits of a message's buttons: 25 of them, 80 characters a label, 100 characters a `custom_id`.
///
/// # Errors
/// [`SendError::TooManyButtons`], [`SendError::LabelTooLong`] or [`SendError::CustomIdTooLong`], for the first that is.
pub fn check_buttons(buttons: &[Button]) -> Result<(), SendError> {
    if buttons.len() > BUTTONS_MAX {
        return Err(SendError::TooManyButtons { count: buttons.len() });
    }
    for (index, button) in buttons.iter().enumerate() {
        let chars = button.label.chars().count();
        if chars > LABEL_CHARS_MAX {
            return Err(SendError::LabelTooLong { index, chars });
        }
        let chars = button.custom_id.chars().count();
        if chars > CUSTOM_ID_CHARS_MAX {
            return Err(SendError::CustomIdTooLong { index, chars });
        }
    }
    Ok(())
}

/// The children of a view, of any depth: `serde_json` has bounded that already.
fn collect(children: &[Value], buttons: &mut Vec<Button>) -> Result<(), ViewError> {
    for child in children {
        let object = as_object(child, buttons.len())?;
        match row(object)? {
            Some(nested) => collect(nested, buttons)?,
            None if present(object, "label").is_some() => buttons.push(button(object, buttons.len())?),
            None => {}
        }
    }
    Ok(())
}

fn as_object(value: &Value, index: usize) -> Result<&Map<String, Value>, ViewError> {
    value.as_object().ok_or(ViewError::NotAnObject { index })
}

fn row(object: &Map<String, Value>) -> Result<Option<&[Value]>, ViewError> {
    for field in ["children", "components"] {
        if let Some(value) = present(object, field) {
            return value.as_array().map(|a| Some(a.as_slice())).ok_or(ViewError::NotAnArray { field });
        }
    }
    Ok(None)
}

fn present<'v>(object: &'v Map<String, Value>, field: &str) -> Option<&'v Value> {
    object.get(field).filter(|value| !value.is_null())
}

fn button(object: &Map<String, Value>, index: usize) -> Result<Button, ViewError> {
    let text = |field| match present(object, field) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(_) => Err(ViewError::BadField { index, field, expected: "a string" }),
    };
    let emoji = match present(object, "emoji") {
        Some(Value::Object(emoji)) => present(emoji, "name").and_then(Value::as_str).map(str::to_owned),
        _ => text("emoji")?,
    };
    let disabled = match present(object, "disabled") {
        None => None,
        Some(Value::Bool(disabled)) => Some(*disabled),
        Some(_) => return Err(ViewError::BadField { index, field: "disabled", expected: "true or false" }),
    };
    let style = match present(object, "style") {
        None => None,
        Some(value) => Some(style(value).ok_or(ViewError::UnknownStyle { index })?),
    };
    let label = text("label")?.unwrap_or_default();
    let custom_id = text("custom_id")?.unwrap_or_default();
    Ok(Button { label, custom_id, emoji, style, url: text("url")?, disabled })
}

fn style(value: &Value) -> Option<ButtonStyle> {
    use ButtonStyle::{Danger, Link, Premium, Primary, Secondary, Success};
    let all = [Primary, Secondary, Success, Danger, Link, Premium];
    match value {
        Value::String(name) => all.into_iter().find(|style| style.as_str() == name),
        Value::Number(number) => {
            let index = usize::try_from(number.as_u64()?).ok()?.checked_sub(1)?;
            all.get(index).copied()
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn short(buttons: &[Button]) -> String {
        let one = |b: &Button| {
            let style = b.style.map_or("-", ButtonStyle::as_str);
            let url = b.url.as_deref().unwrap_or("-");
            let disabled = b.disabled.map_or("-".to_owned(), |d| d.to_string());
            format!("{}|{}|{}|{style}|{url}|{disabled}", b.label, b.custom_id, b.emoji.as_deref().unwrap_or("-"))
        };
        buttons.iter().map(one).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn buttons_are_a_list_or_a_component_view() {
        let check = |view: Value, expected: &str| {
            assert_eq!(parse_view(&view).map(|b| short(&b)), Ok(expected.to_owned()), "{view}");
            assert_eq!(read_view(&view.to_string()).map(|b| short(&b)), Ok(expected.to_owned()), "{view}");
        };
        check(json!([]), "");
        check(json!([{"label": "A", "custom_id": "a"}]), "A|a|-|-|-|-");
        check(json!([{}]), "||-|-|-|-");
        check(json!([{"label": null, "custom_id": null, "style": null, "emoji": null}]), "||-|-|-|-");
        check(
            json!([{"label": "A", "custom_id": "a", "emoji": "🔥", "style": "danger", "url": "https://x", "disabled": true, "row": 3}]),
            "A|a|🔥|danger|https://x|true",
        );
        check(json!([{"label": "A", "emoji": {"id": 1, "name": "🔥"}}]), "A||🔥|-|-|-");
        check(json!({"children": [{"label": "A"}, {"type": "select", "custom_id": "s"}]}), "A||-|-|-|-");
        check(json!({"components": [{"components": [{"label": "A"}]}, {"label": "B"}]}), "A||-|-|-|- B||-|-|-|-");
        check(json!([{"children": [{"label": "A"}]}, {"children": [{"label": ""}]}]), "A||-|-|-|- ||-|-|-|-");
        for (number, name) in
            [(1, "primary"), (2, "secondary"), (3, "success"), (4, "danger"), (5, "link"), (6, "premium")]
        {
            check(json!([{"label": "A", "style": number}]), &format!("A||-|{name}|-|-"));
            check(json!([{"label": "A", "style": name}]), &format!("A||-|{name}|-|-"));
        }
    }

    #[test]
    fn a_bad_view_is_a_typed_error() {
        let check = |view: Value, expected: ViewError| {
            assert_eq!(read_view(&view.to_string()), Err(expected.clone()), "{view}");
            assert_eq!(parse_view(&view), Err(expected), "{view}");
        };
        check(json!("x"), ViewError::NotAView);
        check(json!(null), ViewError::NotAView);
        check(json!({}), ViewError::NotAView);
        check(json!({"label": "A"}), ViewError::NotAView);
        check(json!([{}, 1]), ViewError::NotAnObject { index: 1 });
        check(json!({"children": [[]]}), ViewError::NotAnObject { index: 0 });
        check(json!({"children": {}}), ViewError::NotAnArray { field: "children" });
        check(json!([{"label": 1}]), ViewError::BadField { index: 0, field: "label", expected: "a string" });
        check(
            json!([{"disabled": "no"}]),
            ViewError::BadField { index: 0, field: "disabled", expected: "true or false" },
        );
        for style in [json!("blue"), json!(0), json!(7), json!(-1), json!(1.5), json!([])] {
            check(json!([{}, {"style": style}]), ViewError::UnknownStyle { index: 1 });
        }
    }

    #[test]
    fn a_text_is_read_no_further_than_buttons_can_go() {
        let check = |text: &str, expected: ViewError| assert_eq!(read_view(text), Err(expected));
        let list = |item: &str, count: usize| format!("[{}]", vec![item; count].join(","));
        let full = r#"{"label":"A","custom_id":"a","emoji":{"name":"e"},"style":1,"url":"u","disabled":true,"type":2}"#;
        assert_eq!(read_view(&list(&list(full, 5), 1)), Err(ViewError::NotAnObject { index: 0 }));
        assert_eq!(read_view(&list(full, 25)).map(|buttons| buttons.len()), Ok(25));
        check(&list(full, 26), ViewError::Limit(SendError::TooManyButtons { count: 26 }));
        check(&list("{}", 1_000_000), ViewError::TooMuch);
        check(&format!(r#"{{"children":{}}}"#, list("{}", 1_000_000)), ViewError::TooMuch);
        check(&format!(r#"[{{"emoji":{}}}]"#, list("1", 1_000_000)), ViewError::TooMuch);
        let nested = |levels: usize| format!("{}[]{}", r#"{"children":["#.repeat(levels), "]}".repeat(levels));
        check(&nested(7), ViewError::NotAnObject { index: 0 });
        check(&nested(8), ViewError::TooMuch);
        check(&nested(1_000_000), ViewError::TooMuch);
        // What does not count may be of any kind.
        let ignored = format!(r#"[{{"label":"A","options":{}}}]"#, list("[{}]", 1_000_000));
        assert_eq!(read_view(&ignored).map(|buttons| short(&buttons)), Ok("A||-|-|-|-".to_owned()));
        for text in [
            "",
            "[",
            "[]]",
            r#"[{"label":"\ud800"}]"#,
            r#"[{"style":1e999}]"#,
            r#"[{"url":"a","url":"b"}]"#,
            r#"{"children":[],"children":[]}"#,
        ] {
            assert!(matches!(read_view(text), Err(ViewError::NotJson { .. })), "{text}");
        }
    }

    #[test]
    fn the_limits_of_buttons_count_characters() {
        let label = |chars: usize| Button { label: "日".repeat(chars), ..Button::default() };
        let id = |chars: usize| Button { custom_id: "日".repeat(chars), ..Button::default() };
        assert_eq!(check_buttons(&vec![label(80); 25]), Ok(()));
        assert_eq!(check_buttons(&vec![id(100); 25]), Ok(()));
        assert_eq!(check_buttons(&vec![label(1); 26]), Err(SendError::TooManyButtons { count: 26 }));
        assert_eq!(check_buttons(&[label(1), label(81)]), Err(SendError::LabelTooLong { index: 1, chars: 81 }));
        assert_eq!(check_buttons(&[id(101)]), Err(SendError::CustomIdTooLong { index: 0, chars: 101 }));
    }
}
