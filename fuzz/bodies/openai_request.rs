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
    assert!(request.text.chars().count() as u64 <= request.prompt_chars + bytes_of_breaks(&messages));
    assert_eq!(request.extra["messages"], messages);
    assert_eq!(request.extra["params"], Value::Object(reference));
    let model = request.model_or("tabcast").to_owned();
    assert_eq!(request.extra["model"], model);
}

/// At most one line break stands behind each part.
fn bytes_of_breaks(messages: &Value) -> u64 {
    let contents = messages.as_array().into_iter().flatten().filter_map(|message| message["content"].as_array());
    contents.map(|parts| parts.len() as u64).sum()
}
