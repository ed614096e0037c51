//! The stream that workers read.

use super::*;

/// The texts on the inbound stream, in order.
async fn appended(worker: &Worker) -> String {
    let Value::Array(entries) = worker.ask(&["XRANGE", IN, "-", "+"]).await else { return String::new() };
    let content = |entry: &Value| {
        let text = text(entry);
        let json: serde_json::Value = serde_json::from_str(&text[text.find('{').unwrap()..]).unwrap();
        json["content"].as_str().unwrap().to_owned()
    };
    entries.iter().map(content).collect::<Vec<_>>().join(" ")
}

#[tokio::test]
async fn messages_are_appended_in_order_with_their_group_before_them() {
    let server = RedisServer::start();
    let worker = Worker(server.link());
    let node = Node::start(&server, "a");
    until("workers", async || {
        let Ok(groups) = worker.0.query(redis::cmd("XINFO").arg("GROUPS").arg(IN).clone()).await else {
            return String::new();
        };
        text(&groups).split(' ').nth(1).unwrap_or_default().to_owned()
    })
    .await;
    let messages: Vec<_> = (0..1000_u32).map(|n| message(&format!("webchat:{n}"), &n.to_string())).collect();
    let results = join_all(messages.iter().map(|message| node.appender.append_within(message, MESSAGE_TIMEOUT))).await;
    assert!(results.iter().all(Result::is_ok));
    assert_eq!(appended(&worker).await, numbers(0..1000));
    assert!(node.counts().starts_with("appended=1000 takeovers"), "{}", node.counts());
    // The bound of the stream: about so many, in whole nodes of a hundred.
    let messages: Vec<_> = (0..900_u32).map(|n| message("webchat:u", &n.to_string())).collect();
    join_all(messages.iter().map(|message| node.appender.append_within(message, MESSAGE_TIMEOUT))).await;
    assert!(worker.ask_text(&["XLEN", IN]).await.parse::<u32>().unwrap() < 1200);
}

#[tokio::test]
async fn messages_wait_for_a_redis_that_is_away() {
    let mut server = RedisServer::start();
    let worker = Worker(server.link());
    let node = Node::start(&server, "a");
    node.appender.append_within(&message("webchat:u", "0"), MESSAGE_TIMEOUT).await.unwrap();
    server.stop();
    let given_up = node.appender.append_within(&message("webchat:u", "x"), Duration::from_millis(300)).await;
    assert_eq!(given_up, Err(AppendError::Unavailable));
    let messages = ["1", "2", "3"].map(|text| message("webchat:u", text));
    let waiting = join_all(messages.iter().map(|message| node.appender.append_within(message, MESSAGE_TIMEOUT)));
    let restarted = async {
        sleep(Duration::from_millis(300)).await;
        server.restart();
    };
    let (results, ()) = tokio::join!(waiting, restarted);
    assert_eq!(results, [Ok(()), Ok(()), Ok(())]);
    drop(worker.0.query(redis::cmd("PING")).await);
    worker.0.pause().await;
    assert_eq!(appended(&worker).await, "1 2 3");
    assert!(node.counts().contains("appended=4 append_failures=1"), "{}", node.counts());
    node.shut_down().await;
}

#[tokio::test]
async fn a_message_that_redis_refuses_is_an_error_at_once() {
    let server = RedisServer::start();
    let worker = Worker(server.link());
    worker.ask(&["SET", IN, "not a stream"]).await;
    let node = Node::start(&server, "a");
    let refused = node.appender.append_within(&message("webchat:u", "0"), MESSAGE_TIMEOUT).await;
    assert!(matches!(&refused, Err(AppendError::Refused(reason)) if reason.starts_with("WRONGTYPE")), "{refused:?}");
    // What passes is waited for.
    worker.ask(&["DEL", IN]).await;
    worker.ask(&["CONFIG", "SET", "maxmemory", "1"]).await;
    let sent = message("webchat:u", "1");
    let passing = async {
        sleep(Duration::from_millis(200)).await;
        worker.ask(&["CONFIG", "SET", "maxmemory", "0"]).await;
    };
    let (result, ()) = tokio::join!(node.appender.append_within(&sent, MESSAGE_TIMEOUT), passing);
    assert_eq!((result, appended(&worker).await), (Ok(()), "1".to_owned()));
}

#[tokio::test]
async fn what_waits_to_be_appended_is_bounded() {
    let mut server = RedisServer::start();
    let node = Node::start(&server, "a");
    server.stop();
    let large = message("webchat:u", &"x".repeat(40 << 20));
    let mut first = Box::pin(node.appender.append_within(&large, MESSAGE_TIMEOUT));
    assert_eq!((&mut first).now_or_never(), None);
    assert_eq!(node.appender.append_within(&large, MESSAGE_TIMEOUT).await, Err(AppendError::Full), "by bytes");
    let small = message("webchat:u", "x");
    let mut waiting: Vec<_> =
        (0..5000).map(|_| Box::pin(node.appender.append_within(&small, MESSAGE_TIMEOUT))).collect();
    let full = waiting.iter_mut().filter_map(|one| one.now_or_never()).count();
    assert!(full >= 600, "by number: {full}");
}

#[tokio::test]
async fn the_worker_appends_and_the_adapter_answers() {
    let server = RedisServer::start();
    let worker = Worker(server.link());
    let outlet = Arc::new(Recorder::default());
    let chat = Arc::new(WebChat::new(Arc::clone(&outlet), BotIdentity::default()));
    let metrics = Arc::new(Metrics::new(1));
    let (shutdown, stopping) = watch::channel(false);
    let hand_off: Arc<dyn HandOff> = Arc::clone(&chat) as Arc<dyn HandOff>;
    let form = EnvelopeForm::MessagePack;
    let ends = Shutdown { consuming: stopping.clone(), appending: stopping };
    let streams = start(&server.endpoint("a"), StreamSettings { form, ..settings("a") }, hand_off, &metrics, ends);
    let mut tasks = JoinSet::new();
    tasks.spawn(streams.appending);
    tasks.spawn(streams.consuming);
    RedisWorker::new(Arc::clone(&streams.appender)).handle(message("webchat:u", "hi"), chat).await;
    let entries = worker.ask(&["XRANGE", IN, "-", "+"]).await;
    let Value::Array(entries) = entries else { panic!("{entries:?}") };
    let Value::Array(parts) = &entries[0] else { panic!("{entries:?}") };
    let Value::Array(fields) = &parts[1] else { panic!("{parts:?}") };
    let Value::BulkString(envelope) = &fields[1] else { panic!("{fields:?}") };
    let envelope: serde_json::Value = rmp_serde::from_slice(envelope).unwrap();
    assert_eq!((&envelope["content"], &envelope["channel_id"]), (&"hi".into(), &"webchat:u".into()));
    let id = "00000000-0000-4000-8000-000000000001";
    for line in [
        r#"{"channel_id":"u","type":"message","text":"a","message_id":"$"}"#,
        r#"{"channel_id":"u","type":"buttons","text":"b","message_id":"$","buttons":[{"label":"A","custom_id":"a"}]}"#,
        r#"{"channel_id":"u","type":"edit","text":"c","message_id":"$"}"#,
        r#"{"channel_id":"room:r","type":"typing","active":true}"#,
        r#"{"channel_id":"sse:r","type":"end"}"#,
    ] {
        worker.add(&line.replace('$', id)).await;
    }
    worker.all_acked().await;
    let expected = [
        "webchat:u message $ sender=star text='a' at=7.5",
        "webchat:u buttons $ sender=star text='b' [A=a] at=7.5",
        "webchat:u edit $ text='c' at=7.5",
        "room:r typing true",
        "sse:r end stop",
    ];
    assert_eq!(outlet.take(), expected.map(|line| line.replace('$', id)));
    shutdown.send(true).unwrap();
    while tasks.join_next().await.is_some() {}
}

#[tokio::test]
async fn a_cluster_takes_what_belongs_together_in_one_slot() {
    let mut server = RedisServer::start_cluster();
    let worker = Worker(server.link());
    let node = Node::start(&server, "a");
    let messages: Vec<_> = (0..300_u32).map(|n| message(&format!("webchat:{n}"), &n.to_string())).collect();
    let results = join_all(messages.iter().map(|message| node.appender.append_within(message, MESSAGE_TIMEOUT))).await;
    assert!(results.iter().all(Result::is_ok), "{results:?}");
    assert_eq!(appended(&worker).await, numbers(0..300));
    for n in 0..300 {
        worker.add(&said(&n.to_string(), Some(&format!("key {n} {{x}}")))).await;
    }
    worker.add("{").await;
    worker.add(&said("double", Some("key 7 {x}"))).await;
    worker.say("300").await;
    node.sees(&numbers(0..301)).await;
    worker.all_acked().await;
    assert_eq!(worker.ask_text(&["XLEN", DEAD]).await, "1");
    until("1", async || node.metrics.engine.streams_of_workers.doubled.value().to_string()).await;
    server.restart();
    let found =
        async || worker.0.query(redis::cmd("EXISTS").arg(OUT).clone()).await.is_ok_and(|found| found == Value::Int(1));
    until("true", async || found().await.to_string()).await;
    worker.say("301").await;
    node.sees(&numbers(0..302)).await;
    worker.all_acked().await;
}

#[test]
fn keys_are_in_the_slot_of_their_stream() {
    assert_eq!(beside("sg:out", "lease"), "{sg:out}:lease");
    assert_eq!(beside("{sg}:out", "lease"), "{sg}:out:lease");
    assert_eq!(beside("a{b}c", "x"), "a{b}c:x");
}
