//! What an OpenAI client says: the body of a chat completion into what a worker gets.
//!
//! Reading is lenient, as SDKs and chat front ends need it: what this module does not know it hands on, untouched.
//! Refused is only what no worker could answer.

use serde_json::{Map, Value};

use crate::platform::json_value;
pub use crate::proto::completion::{ErrorKind, error_body};

/// The most bytes of a model's name. It is in every chunk of the answer.
pub const MODEL_BYTES_MAX: usize = 256;

/// The most values of one request, in objects and arrays at any depth. Built, a small one may take over 600 bytes.
pub const VALUES_MAX: usize = 100_000;

const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "function"];

/// Stands between the text parts of one message.
const PART_BREAK: &str = "\n";

/// Why a request was refused: the `error` of a 400, whose type is [`ErrorKind::InvalidRequest`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct BadRequest {
    /// What is wrong, for a person.
    pub message: String,
    /// Which part of the body, for example `messages[2].role`.
    pub param: Option<String>,
    /// `invalid_json` for a body that is none, or is nested deeper than 127 levels.
    pub code: Option<&'static str>,
}

impl BadRequest {
    fn param(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { message: message.into(), param: Some(param.into()), code: None }
    }

    /// The body of the answer: see [`error_body`].
    #[must_use]
    pub fn body(&self) -> Vec<u8> {
        error_body(&self.message, ErrorKind::InvalidRequest, self.param.as_deref(), self.code)
    }
}

/// The request for a chat completion.
///
/// ```
/// use tabcast::platform::openai::ChatRequest;
/// let body = br#"{"model":"m","messages":[{"role":"user","content":"hi"}],"stream":true,"top_p":0.5}"#;
/// let request = ChatRequest::parse(body)?;
/// assert_eq!((request.text.as_str(), request.is_stream, request.prompt_chars), ("hi", true, 2));
/// assert_eq!(request.extra["params"]["top_p"], 0.5);
/// # Ok::<(), tabcast::platform::openai::BadRequest>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct ChatRequest {
    /// As the client named it, at most [`MODEL_BYTES_MAX`] bytes; `None` means the gateway's first.
    pub model: Option<String>,
    /// The content of the last message of a user, or of the last message if no user wrote one. Text parts are joined
    /// by line breaks, other parts have no text.
    pub text: String,
    /// Whether the answer is a stream.
    pub is_stream: bool,
    /// Whether that stream ends with a chunk with the usage.
    pub wants_usage: bool,
    /// Characters (Unicode scalar values) of all text contents: what the usage is estimated from.
    pub prompt_chars: u64,
    /// What a worker finds as `extra.openai`: `model` (`null` if the client named none), `messages` as they were sent,
    /// and `params`, all other keys but `stream` and `stream_options`.
    pub extra: Map<String, Value>,
}

impl ChatRequest {
    /// Reads a body. Its length is the caller's to bound; what is built holds at most about 64 MB more than that.
    ///
    /// Unknown keys are kept, and `null` stands for an absent optional key.
    ///
    /// # Errors
    /// Not UTF-8, not JSON, nested deeper than 127 levels, of more than [`VALUES_MAX`] values or not an object; a key
    /// that is there twice in one object, at any level; `messages` that are no array of messages, or empty; a known key
    /// of the wrong type; `n` other than 1.
    pub fn parse(body: &[u8]) -> Result<Self, BadRequest> {
        if values(body) > VALUES_MAX {
            let message = format!("the body has too many values; at most {VALUES_MAX} are allowed");
            return Err(BadRequest { message, param: None, code: Some("too_many_values") });
        }
        // The parser bounds the depth, and so what walking and dropping a value takes of the stack.
        let value = json_value::parse(body).map_err(|error| BadRequest {
            message: format!("the body is not JSON: {error}"),
            param: None,
            code: Some("invalid_json"),
        })?;
        let Value::Object(mut params) = value else {
            let message = "the body must be a JSON object".to_owned();
            return Err(BadRequest { message, param: None, code: Some("invalid_json") });
        };
        let model = model(params.remove("model"))?;
        let is_stream = boolean(params.remove("stream").as_ref(), "stream")?;
        let wants_usage = wants_usage(params.remove("stream_options").as_ref())?;
        if params.get("n").is_some_and(|n| !n.is_null() && n.as_f64() != Some(1.0)) {
            return Err(BadRequest::param("n", "`n` must be 1: there is one answer"));
        }
        let messages = params.remove("messages");
        let (text, prompt_chars) = read_messages(messages.as_ref())?;
        let extra = Map::from_iter([
            ("model".to_owned(), Value::from(model.clone())),
            ("messages".to_owned(), messages.unwrap_or_default()),
            ("params".to_owned(), Value::Object(params)),
        ]);
        Ok(Self { model, text, is_stream, wants_usage, prompt_chars, extra })
    }

    /// Names `default` where the client named no model, for the worker too, and returns the answer's model.
    pub fn model_or(&mut self, default: &str) -> &str {
        let model = self.model.get_or_insert_with(|| default.to_owned());
        self.extra.insert("model".to_owned(), Value::from(model.as_str()));
        model
    }
}

/// How many values a JSON text can have at most: one for each bracket and comma that is in no string.
fn values(body: &[u8]) -> usize {
    let (mut count, mut is_text, mut is_escaped) = (0, false, false);
    for byte in body {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' if is_text => is_escaped = true,
            b'"' => is_text = !is_text,
            b',' | b'[' | b'{' if !is_text => count += 1,
            _ => {}
        }
    }
    count
}

fn model(value: Option<Value>) -> Result<Option<String>, BadRequest> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(model)) if model.len() <= MODEL_BYTES_MAX => Ok(Some(model)),
        Some(Value::String(model)) => {
            let message = format!("`model` has {} bytes; at most {MODEL_BYTES_MAX} are allowed", model.len());
            Err(BadRequest::param("model", message))
        }
        Some(_) => Err(BadRequest::param("model", "`model` must be a string")),
    }
}

fn boolean(value: Option<&Value>, name: &str) -> Result<bool, BadRequest> {
    match value {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(value)) => Ok(*value),
        Some(_) => Err(BadRequest::param(name, format!("`{name}` must be true or false"))),
    }
}

fn wants_usage(options: Option<&Value>) -> Result<bool, BadRequest> {
    match options {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Object(options)) => boolean(options.get("include_usage"), "stream_options.include_usage"),
        Some(_) => Err(BadRequest::param("stream_options", "`stream_options` must be an object")),
    }
}

/// The text for the worker, and the characters of all texts.
fn read_messages(messages: Option<&Value>) -> Result<(String, u64), BadRequest> {
    let refused = |message: &str| Err(BadRequest::param("messages", message));
    let messages = match messages {
        None | Some(Value::Null) => return refused("`messages` is missing"),
        Some(Value::Array(messages)) if messages.is_empty() => return refused("`messages` is empty"),
        Some(Value::Array(messages)) => messages,
        Some(_) => return refused("`messages` must be an array"),
    };
    let mut chars = 0;
    for (index, message) in messages.iter().enumerate() {
        chars += check_message(message, index)?;
    }
    let is_users = |message: &&Value| message.get("role").and_then(Value::as_str) == Some("user");
    let chosen = messages.iter().rev().find(is_users).or(messages.last());
    Ok((chosen.map(text_of).unwrap_or_default(), chars))
}

/// Checks one message and returns the characters of its texts.
fn check_message(message: &Value, index: usize) -> Result<u64, BadRequest> {
    let refused = |field: &str, message: &str| {
        let param = format!("messages[{index}]{field}");
        Err(BadRequest { message: format!("`{param}` {message}"), param: Some(param), code: None })
    };
    let Value::Object(message) = message else { return refused("", "must be an object") };
    let role = match message.get("role") {
        Some(Value::String(role)) if ROLES.contains(&role.as_str()) => role.as_str(),
        None => return refused(".role", "is missing"),
        Some(_) => return refused(".role", &format!("must be one of {}", ROLES.join(", "))),
    };
    let parts = match message.get("content") {
        Some(Value::String(text)) => return Ok(text.chars().count() as u64),
        Some(Value::Array(parts)) => parts,
        None | Some(Value::Null) if role == "assistant" => return Ok(0),
        None => return refused(".content", "is missing"),
        Some(_) => return refused(".content", "must be a string or an array of parts"),
    };
    let mut chars = 0;
    for (part_index, part) in parts.iter().enumerate() {
        let Value::Object(part) = part else {
            return refused(&format!(".content[{part_index}]"), "must be an object");
        };
        match (part.get("type"), part.get("text")) {
            (Some(Value::String(kind)), Some(Value::String(text))) if kind == "text" => {
                chars += text.chars().count() as u64;
            }
            (Some(Value::String(kind)), _) if kind == "text" => {
                return refused(&format!(".content[{part_index}].text"), "must be a string");
            }
            (Some(Value::String(_)), _) => {}
            _ => return refused(&format!(".content[{part_index}].type"), "must be a string"),
        }
    }
    Ok(chars)
}

/// The text of a message that was checked.
fn text_of(message: &Value) -> String {
    match message.get("content") {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => {
            let is_text = |part: &&Value| part.get("type").and_then(Value::as_str) == Some("text");
            let texts = parts.iter().filter(is_text).filter_map(|part| part.get("text").and_then(Value::as_str));
            texts.collect::<Vec<_>>().join(PART_BREAK)
        }
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn parse(body: &str) -> Result<ChatRequest, BadRequest> {
        ChatRequest::parse(body.as_bytes())
    }

    fn with_messages(messages: &Value) -> ChatRequest {
        parse(&json!({ "messages": messages }).to_string()).unwrap()
    }

    #[test]
    fn values_are_bounded_and_texts_are_not_mistaken_for_them() {
        let many = |inside: &str| format!(r#"{{"messages":[{{"role":"user","content":"hi"}}],"x":[{inside}]}}"#);
        let error = ChatRequest::parse(many(&vec!["{}"; 60_000].join(",")).as_bytes()).unwrap_err();
        assert_eq!(error.code, Some("too_many_values"));
        let text = format!("\"{}\"", r#",[{\","#.repeat(60_000));
        assert!(ChatRequest::parse(many(&text).as_bytes()).is_ok());
    }

    /// `serde_json` would read the text in such an object as JSON, which nothing counted and whose depth began anew.
    #[test]
    fn nothing_is_read_out_of_a_text() {
        let hidden = format!("[{}]", vec![r#"{"":0}"#; 2 * VALUES_MAX].join(","));
        let disguised = json!({ "$serde_json::private::RawValue": hidden });
        let body = json!({ "messages": [{ "role": "user", "content": "hi" }], "x": disguised });
        assert_eq!(parse(&body.to_string()).unwrap().extra["params"]["x"], disguised, "a text stays a text");
    }

    #[test]
    fn a_key_that_is_there_twice_is_refused() {
        let user = r#""messages":[{"role":"user","content":"x"}]"#;
        for body in [
            format!(r#"{{"stream":true,"stream":false,{user}}}"#),
            format!("{{{user},{user}}}"),
            r#"{"messages":[{"role":"system","role":"user","content":"x"}]}"#.to_owned(),
            format!(r#"{{"tools":[{{"a":{{"b":1,"b":1}}}}],{user}}}"#),
        ] {
            let error = parse(&body).expect_err(&body);
            assert!(error.message.contains("a key is there twice"), "{body}: {error}");
            assert_eq!(error.code, Some("invalid_json"));
        }
    }

    #[test]
    fn the_text_is_what_the_last_user_wrote() {
        let check = |messages: Value, text: &str, chars: u64| {
            let request = with_messages(&messages);
            assert_eq!((request.text.as_str(), request.prompt_chars), (text, chars), "{messages}");
            assert_eq!(request.extra["messages"], messages, "messages are handed on untouched");
        };
        let say = |role: &str, content: Value| json!({ "role": role, "content": content });
        check(json!([say("user", json!("hi"))]), "hi", 2);
        check(json!([say("user", json!(""))]), "", 0);
        check(json!([say("system", json!("s")), say("user", json!("a")), say("assistant", json!("b"))]), "a", 3);
        check(json!([say("user", json!("a")), say("user", json!("b")), say("system", json!("日本"))]), "b", 4);
        check(json!([say("system", json!("s")), say("assistant", json!("last"))]), "last", 5);
        check(json!([say("system", json!("s")), say("assistant", json!(null))]), "", 1);
        check(json!([say("assistant", json!("x")), { "role": "assistant", "tool_calls": [] }]), "", 1);
        check(json!([say("tool", json!("t")), say("function", json!("f")), say("developer", json!("d"))]), "d", 3);
        let text = |text: &str| json!({ "type": "text", "text": text, "cache_control": {} });
        let image = json!({ "type": "image_url", "image_url": { "url": "data:image/png;base64,AAAA" } });
        check(json!([say("user", json!([text("a"), image, text("😀b")]))]), "a\n😀b", 3);
        check(json!([say("user", json!([image]))]), "", 0);
        check(json!([say("user", json!([]))]), "", 0);
        check(json!([say("user", json!([{ "type": "input_audio", "text": 7 }]))]), "", 0);
        check(json!([{ "role": "user", "content": "x", "name": "n", "anything": [1] }]), "x", 1);
    }

    #[test]
    fn switches_are_read_and_everything_else_is_the_workers() {
        let check = |keys: &str, expected: (Option<&str>, bool, bool), params: Value| {
            let body = format!(r#"{{{keys}"messages":[{{"role":"user","content":"x"}}]}}"#);
            let request = parse(&body).expect(&body);
            assert_eq!((request.model.as_deref(), request.is_stream, request.wants_usage), expected, "{keys}");
            assert_eq!(request.extra["params"], params, "{keys}");
            assert_eq!(request.extra["model"], json!(expected.0), "{keys}");
            assert_eq!(request.extra.len(), 3);
        };
        check("", (None, false, false), json!({}));
        check(r#""model":"gpt-4o","#, (Some("gpt-4o"), false, false), json!({}));
        check(
            r#""model":null,"stream":null,"stream_options":null,"n":null,"#,
            (None, false, false),
            json!({"n": null}),
        );
        check(r#""model":"","stream":true,"#, (Some(""), true, false), json!({}));
        check(r#""stream":false,"n":1,"#, (None, false, false), json!({"n": 1}));
        check(r#""n":1.0,"#, (None, false, false), json!({"n": 1.0}));
        check(r#""stream":true,"stream_options":{"include_usage":true},"#, (None, true, true), json!({}));
        check(r#""stream_options":{"include_usage":null,"x":1},"#, (None, false, false), json!({}));
        check(r#""stream_options":{},"#, (None, false, false), json!({}));
        check(
            r#""stop":["\n"],"tools":[{"type":"function"}],"temperature":0.7,"max_tokens":null,"#,
            (None, false, false),
            json!({"stop": ["\n"], "tools": [{"type": "function"}], "temperature": 0.7, "max_tokens": null}),
        );
    }

    #[test]
    fn the_gateways_model_fills_the_gap_for_the_worker_too() {
        let check = |body: &str, expected: &str| {
            let mut request = parse(body).unwrap();
            assert_eq!(request.model_or("tabcast"), expected);
            assert_eq!(request.model.as_deref(), Some(expected));
            assert_eq!(request.extra["model"], expected);
        };
        check(r#"{"messages":[{"role":"user","content":"x"}]}"#, "tabcast");
        check(r#"{"messages":[{"role":"user","content":"x"}],"model":"m"}"#, "m");
    }

    #[test]
    fn what_no_worker_could_answer_is_refused_with_its_place() {
        let check = |body: &str, param: &str, part: &str| {
            let error = parse(body).expect_err(body);
            let found = (error.param.as_deref().unwrap_or(""), error.message.contains(part));
            assert_eq!(found, (param, true), "{body}: {error}");
            assert_eq!(error.code, param.is_empty().then_some("invalid_json"), "{body}");
        };
        for body in ["", " ", "{", "nope", "{'a':1}", "{}x", "{\"messages\":[", "{\"a\":\"\\ud800\"}", "\u{feff}{}"] {
            check(body, "", "not JSON");
        }
        for body in ["1", "null", "\"x\"", "[]", "[{\"messages\":[]}]", "true"] {
            check(body, "", "must be a JSON object");
        }
        let nested = |levels: usize| {
            let (open, close) = ("[".repeat(levels - 1), "]".repeat(levels - 1));
            format!(r#"{{"x":{open}{close},"messages":[{{"role":"user","content":"x"}}]}}"#)
        };
        assert!(parse(&nested(127)).is_ok());
        check(&nested(129), "", "not JSON: recursion limit exceeded");
        check(&"[".repeat(90_000), "", "not JSON");
        check(&"{\"messages\":".repeat(90_000), "", "not JSON");
        check("{}", "messages", "missing");
        check(r#"{"messages":null}"#, "messages", "missing");
        check(r#"{"messages":[]}"#, "messages", "empty");
        for messages in ["{}", "\"hi\"", "1", "true"] {
            check(&format!(r#"{{"messages":{messages}}}"#), "messages", "must be an array");
        }
        let user = r#"{"role":"user","content":"x"}"#;
        let second = |message: &str| format!(r#"{{"messages":[{user},{message}]}}"#);
        for message in ["null", "1", "\"x\"", "[]"] {
            check(&second(message), "messages[1]", "must be an object");
        }
        check(&second("{}"), "messages[1].role", "is missing");
        for role in ["null", "1", "\"\"", "\"User\"", "\"bot\"", "[\"user\"]"] {
            check(
                &second(&format!(r#"{{"role":{role},"content":"x"}}"#)),
                "messages[1].role",
                "must be one of system,",
            );
        }
        for role in ["user", "system", "developer", "tool", "function"] {
            check(&second(&format!(r#"{{"role":"{role}"}}"#)), "messages[1].content", "is missing");
            check(
                &second(&format!(r#"{{"role":"{role}","content":null}}"#)),
                "messages[1].content",
                "must be a string",
            );
        }
        for content in ["1", "{}", "true"] {
            let message = format!(r#"{{"role":"assistant","content":{content}}}"#);
            check(&second(&message), "messages[1].content", "a string or an array of parts");
        }
        let part = |part: &str| second(&format!(r#"{{"role":"user","content":[{{"type":"x"}},{part}]}}"#));
        for bad in ["null", "\"text\"", "[]", "1"] {
            check(&part(bad), "messages[1].content[1]", "must be an object");
        }
        for bad in ["{}", r#"{"type":null}"#, r#"{"type":1}"#, r#"{"text":"x"}"#] {
            check(&part(bad), "messages[1].content[1].type", "must be a string");
        }
        for bad in [r#"{"type":"text"}"#, r#"{"type":"text","text":null}"#, r#"{"type":"text","text":["x"]}"#] {
            check(&part(bad), "messages[1].content[1].text", "must be a string");
        }
    }

    #[test]
    fn a_known_key_of_the_wrong_type_is_refused_by_name() {
        let check = |key: &str, param: &str| {
            let body = format!(r#"{{{key},"messages":[{{"role":"user","content":"x"}}]}}"#);
            let error = parse(&body).expect_err(&body);
            assert_eq!((error.param.as_deref(), error.code), (Some(param), None), "{body}: {error}");
        };
        for value in ["1", "[]", "{}", "true"] {
            check(&format!(r#""model":{value}"#), "model");
        }
        check(&format!(r#""model":"{}""#, "m".repeat(257)), "model");
        for value in ["1", "0", "\"true\"", "[]"] {
            check(&format!(r#""stream":{value}"#), "stream");
            check(&format!(r#""stream_options":{value}"#), "stream_options");
            check(&format!(r#""stream_options":{{"include_usage":{value}}}"#), "stream_options.include_usage");
        }
        for value in ["0", "2", "-1", "1.5", "\"1\"", "true", "[1]", "99999999999999999999"] {
            check(&format!(r#""n":{value}"#), "n");
        }
    }

    #[test]
    fn bytes_that_are_not_utf8_are_refused() {
        let error = ChatRequest::parse(b"{\"messages\":[{\"role\":\"user\",\"content\":\"\xff\"}]}").unwrap_err();
        assert_eq!((error.code, error.param), (Some("invalid_json"), None));
    }

    #[test]
    fn a_refusal_is_a_body_in_the_shape_that_clients_know() {
        let error = parse(r#"{"messages":[{"role":"\"\u2028"}]}"#).unwrap_err();
        let expected = concat!(
            r#"{"error":{"message":"`messages[0].role` must be one of system, developer, user, assistant, tool, function","#,
            r#""type":"invalid_request_error","param":"messages[0].role","code":null}}"#,
        );
        assert_eq!(String::from_utf8(error.body()).unwrap(), expected);
        let body: Value = serde_json::from_slice(&parse("[").unwrap_err().body()).unwrap();
        assert_eq!((&body["error"]["code"], &body["error"]["param"]), (&json!("invalid_json"), &Value::Null));
    }

    proptest! {
        #[test]
        fn whatever_is_said_is_counted_and_handed_on(texts in proptest::collection::vec(".{0,20}", 1..6)) {
            let messages: Vec<Value> =
                texts.iter().map(|text| json!({ "role": "user", "content": text })).collect();
            let request = with_messages(&json!(messages));
            prop_assert_eq!(Some(&request.text), texts.last());
            prop_assert_eq!(request.prompt_chars, texts.iter().map(|text| text.chars().count() as u64).sum::<u64>());
            prop_assert_eq!(&request.extra["messages"], &json!(messages));
        }

        #[test]
        fn whatever_comes_is_a_request_or_a_refusal(
            changes in proptest::collection::vec((any::<usize>(), any::<u8>()), 0..6),
            cut in any::<usize>(),
        ) {
            let whole = r#"{"model":"m","messages":[{"role":"user","content":[{"type":"text","text":"a\u00e9"}]}],"stream":true,"stream_options":{"include_usage":true},"n":1}"#;
            let mut body = whole.as_bytes().to_vec();
            for (at, byte) in changes {
                let at = at % body.len();
                body[at] = byte;
            }
            body.truncate(cut % 400);
            match ChatRequest::parse(&body) {
                Ok(_) => prop_assert!(serde_json::from_slice::<Value>(&body).is_ok()),
                Err(error) => prop_assert!(!error.message.is_empty()),
            }
        }
    }
}
