//! Whatever an API client sends is a request that was read as `serde_json` reads it, or a refusal in OpenAI's shape.

use serde_json::{Map, Value};
use tabcast::platform::openai::{ChatRequest, MODEL_BYTES_MAX};

/// The bytes are the body of one request.
pub(crate) fn run(bytes: &[u8]) {
    let first = ChatRequest::parse(bytes);
    assert_eq!(first, ChatRequest::parse(bytes));
    match first {
        Ok(request) => {
            let reference = serde_json::from_slice::<Map<String, Value>>(bytes).expect("a request is an object");
            accepted(request, reference);
        }
        Err(error) => {
            assert!(!error.message.is_empty());
            assert_eq!(error.code.is_some(), error.param.is_none());
            let body: Value = serde_json::from_slice(&error.body()).expect("JSON");
            assert_eq!(body["error"]["message"], error.message);
            assert_eq!(body["error"]["param"], Value::from(error.param));
        }
    }
}

fn accepted(mut request: ChatRequest, mut reference: Map<String, Value>) {
    assert!(request.model.as_ref().is_none_or(|model| model.len() <= MODEL_BYTES_MAX));
    assert_eq!(reference.remove("stream") == Some(Value::Bool(true)), request.is_stream);
    let options = reference.remove("stream_options").unwrap_or_default();
    assert_eq!(options["include_usage"] == true, request.wants_usage);
    assert_eq!(reference.remove("model").unwrap_or_default(), Value::from(request.model.clone()));
    let messages = reference.remove("messages").expect("messages");
    assert!(messages.as_array().is_some_and(|messages| !messages.is_empty()));
    let messages_texts: Vec<(bool, Vec<&str>)> = messages.as_array().into_iter().flatten().map(said).collect();
    let chosen = messages_texts.iter().rfind(|(is_users, _)| *is_users).or(messages_texts.last());
    assert_eq!(Some(&request.text), chosen.map(|(_, texts)| texts.join("\n")).as_ref());
    let chars = messages_texts.iter().flat_map(|(_, texts)| texts).map(|text| text.chars().count() as u64);
    assert_eq!(request.prompt_chars, chars.sum::<u64>());
    assert_eq!(request.extra["messages"], messages);
    assert_eq!(request.extra["params"], Value::Object(reference));
    let model = request.model_or("tabcast").to_owned();
    assert_eq!(request.extra["model"], model);
}

/// Whether a message is the user's, and its texts.
fn said(message: &Value) -> (bool, Vec<&str>) {
    let parts = message["content"].as_array().into_iter().flatten();
    let texts = parts.filter(|part| part["type"] == "text").map(|part| part["text"].as_str().expect("a text"));
    (message["role"] == "user", message["content"].as_str().into_iter().chain(texts).collect())
}
